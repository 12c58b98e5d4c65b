"""Where to clip the activations of a site: symmetric grids of few bits, one step per tensor or per token.

Per tensor (static) the step is fixed at calibration, from a histogram of |x| (`RULES`, `mixed`); per token (dynamic) it
follows from the largest value of each token while the model runs, and nothing is clipped. A grid of b bits has the
codes -Q..Q with Q = 2^(b-1) - 1 and the step clip / Q.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.histogram import Histogram, edges

__all__ = [
    "RULES",
    "choose",
    "divergences",
    "mixed",
    "per_token",
    "percentile",
    "quantize",
    "squared_errors",
]

PERCENTILE = 0.9999
SMOOTHING = 1e-4
EVEN = 2048  # bins of the published rule
COARSE = 16  # clips tried per octave
FINE = 32  # tried between a coarse one and the next


def quantize(x: Float[Tensor, "*any"], clip: float | Tensor, bits: int = 8) -> Float[Tensor, "*any"]:
    """The values of the grid nearest to x: `s * clamp(round(x / s), -Q, Q)`, s = clip / Q. A clip of 0 gives zeros."""
    levels = _levels(bits)
    step = torch.as_tensor(clip, dtype=x.dtype, device=x.device) / levels
    codes = (x / step.clamp_min(torch.finfo(x.dtype).tiny)).round_().clamp_(-levels, levels)
    return codes.mul_(step)


def per_token(x: Float[Tensor, "... in"], bits: int = 8) -> Float[Tensor, "... in"]:
    """Every token on a grid of its own that reaches its largest value: the error is at most half a step,
    `max|x_t| / (2 Q)`."""
    return quantize(x, x.abs().amax(-1, keepdim=True), bits)


def squared_errors(
    histogram: Histogram, clips: Float[Tensor, " n"], bits: int = 8
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean squared error that each clip makes: (of values beyond the clip, of rounding the others).

    Exact on the histogram: a bin takes the code of its mean, and its sums give the error of all its values with that
    code. So this is the error of a grid whose borders between codes moved by at most the width of a bin: never below
    the error of rounding to nearest, and above it by less than `(Q / 512)^2 / 3` of the rounding error where values
    are spread evenly.
    """
    counts, sums, squares = (
        x[histogram.occupied] for x in (histogram.counts.sum(0), histogram.sums, histogram.squares)
    )
    means, levels = histogram.means, _levels(bits)
    beyond, within = [], []
    for clip in clips.double():
        step = clip / levels
        values = (means / step).round_().clamp_max_(levels).mul_(step)
        error = squares - 2 * values * sums + values.square() * counts
        over = means > clip
        beyond.append(error[over].sum())
        within.append(error[~over].sum())
    return torch.stack(beyond) / histogram.count, torch.stack(within) / histogram.count


def divergences(
    histogram: Histogram,
    clips: Float[Tensor, " n"],
    bits: int = 8,
    smoothing: float = SMOOTHING,
    even: int | None = None,
) -> Float[Tensor, " n"]:
    """Kullback-Leibler divergence, in nats, of the quantized from the original distribution of |x|, for each clip.

    The entropy calibration of integer inference (Migacz: 8-bit inference with TensorRT, GTC 2017), on the bins of the
    histogram or, as there, on so many `even` ones up to the largest value. Even bins do not see what is smaller than
    one of them, which can be all but one value.

    P: the masses of the bins up to the clip; what lies beyond is added to the last of them, as clipping does.
    Q: the masses without what lies beyond, summed over all bins that round to one code, and spread again over those of
       them that hold values, in proportion to their width; divided by its total.
    `sum P ln(P / ((1 - e) Q + e U))`, U even over the bins that hold values, in proportion to their width, e the
    smoothing: Q is zero where clipping made values that were not there.

    The bins are an estimate from a sample: m bins with n values add about m / (2n).
    """
    counts, means, widths = _bins(histogram, even)
    levels, found = _levels(bits), []
    for clip in clips.double():
        inside = max(1, int(torch.searchsorted(means, clip, right=True)))
        original = counts[:inside].clone()
        original[-1] += counts[inside:].sum()
        codes = (means[:inside] * (levels / clip)).round_().clamp_max_(levels).long()
        masses = torch.bincount(codes, weights=counts[:inside])
        spans = torch.bincount(codes, weights=widths[:inside])
        spread = masses[codes] * widths[:inside] / spans[codes]
        p, q = original / original.sum(), spread / spread.sum()
        q = (1 - smoothing) * q + smoothing * widths[:inside] / widths[:inside].sum()
        found.append((p * (p / q).log()).sum())
    return torch.stack(found)


def _bins(histogram: Histogram, even: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and widths of the bins that hold values; a fine bin goes to the even one of its mean."""
    counts, means, borders = histogram.counts.sum(0)[histogram.occupied], histogram.means, edges()
    if even is None:
        return counts, means, (borders[1:] - borders[:-1])[histogram.occupied]
    width = histogram.largest[0] / even
    places = (means / width).long().clamp_max(even - 1)
    sums = torch.bincount(places, weights=counts * means, minlength=even)
    counts = torch.bincount(places, weights=counts, minlength=even)
    full = counts > 0
    return counts[full], sums[full] / counts[full], width.expand(int(full.sum()))


def _largest(histogram: Histogram, bits: int) -> float:
    """No clipping."""
    return histogram.largest[0].item()


def percentile(histogram: Histogram, bits: int, share: float = PERCENTILE) -> float:
    """The clip below which so many of the values lie."""
    return histogram.quantile(share)


def _squared(histogram: Histogram, bits: int) -> float:
    """The clip with the least mean squared error."""
    return _least(histogram, lambda clips: sum(squared_errors(histogram, clips, bits)))


def _divergence(histogram: Histogram, bits: int) -> float:
    """The clip with the least divergence."""
    return _least(histogram, lambda clips: divergences(histogram, clips, bits))


def _even(histogram: Histogram, bits: int) -> float:
    """The same on even bins, as it was published: no code takes less than one bin, so that with 8 bits the clip is at
    least a sixteenth of the largest value."""
    low = histogram.largest[0].item() * (_levels(bits) + 1) / EVEN
    return _least(histogram, lambda clips: divergences(histogram, clips, bits, even=EVEN), low)


# Each takes a histogram and the bits and gives a clip.
RULES: dict[str, Callable[[Histogram, int], float]] = {
    "max": _largest,
    "percentile": percentile,
    "squared": _squared,
    "divergence": _divergence,
    "divergence, even bins": _even,
}


def choose(histogram: Histogram, rule: str, bits: int = 8) -> float:
    """The clip of a rule of `RULES`. 0 for a site whose inputs are all zero."""
    if rule not in RULES:
        raise ValueError(f"no clip rule {rule!r}; there are {', '.join(RULES)}")
    _levels(bits)
    return RULES[rule](histogram, bits) if histogram.largest[0] > 0 else 0.0


def mixed(kurtosis: float, tau: float, heavy: str = "divergence") -> str:
    """The rule for a tensor by its tail: `squared` where its excess kurtosis is below tau, else `heavy`.

    No tau is right for every model, and infinity may be (see `adapt_tau`).
    """
    return "squared" if kurtosis < tau else heavy


def _least(histogram: Histogram, cost: Callable[[Tensor], Tensor], low: float = 0.0) -> float:
    """The clip of least cost between `low`, half the median or 2^-16 of the largest value, and the largest value.

    Tried at 16 clips per octave, then at 64 between the neighbours of the best: the curve has many shallow minima,
    and within 0.14% of the clip the search may miss the best of them.
    """
    top = histogram.largest[0].item()
    low = max(low, histogram.quantile(0.5) / 2, top * 2.0**-16)
    clips = _geometric(low, top, 1 + COARSE * max(1, round(torch.tensor(top / low).log2().item())))
    best = int(cost(clips).argmin())
    near = clips[max(best - 1, 0)], clips[min(best + 1, len(clips) - 1)]
    clips = torch.cat([clips[best : best + 1], _geometric(near[0].item(), near[1].item(), 2 * FINE + 1)])
    return clips[int(cost(clips).argmin())].item()


def _geometric(low: float, high: float, count: int) -> Float[Tensor, " count"]:
    """Evenly spaced in the logarithm, both ends exact."""
    clips = low * (high / low) ** torch.linspace(0, 1, count, dtype=torch.float64)
    clips[-1] = high
    return clips


def _levels(bits: int) -> int:
    if not 4 <= bits <= 8:
        raise ValueError(f"4 <= bits <= 8 must hold, got {bits}")
    return 2 ** (bits - 1) - 1

"""How long the tail of a site's inputs is: how much lies far out, and what a grid of few levels has to cope with.

The same numbers from a tensor (`tails`, exact) and from a stream of batches (`tails_of`, of their added histograms).
From a stream, exact up to float64 rounding: count, kurtosis, largest value, Hill's index. Within the width of one bin
(1/512 of the value): the median, so also where a share begins and what is divided by it; the entropy of the codes.

Null: a normal law of the same count (`normal_tails`; `normal_tail` for the shares, exact).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.histogram import LARGEST, Histogram, collect

__all__ = ["Tails", "hill", "normal_tail", "normal_tails", "tails", "tails_of"]

SIGMAS, MEDIANS = 6.0, 20.0
BITS = 8


@dataclass(frozen=True)
class Tails:
    """Long-tail statistics of `count` values x, over all tokens and channels of a site.

    kurtosis:       excess, `E(x - mean)^4 / var^2 - 3`; 0 for a normal law, up to the count for one value alone.
    beyond_sigma:   share with |x - mean| above 6 standard deviations; 2e-9 for a normal law.
    beyond_median:  share with |x| above 20 medians of |x|; 0 for a normal law.
    hill, hill_se:  tail index of |x| (see `hill`); moments of that order and above do not exist in a tail that goes on
                    like this: below 4 the kurtosis of a sample says how large the sample is.
    largest:        max |x|. peak: the same in medians of |x|; infinite where half of the values are zero.
    effective_bits: entropy of the codes of a symmetric grid of 8 bits that reaches the largest value, in bits: the
                    effective dynamic range. 2^effective_bits levels, all used alike, would tell as much.
    """

    count: int
    kurtosis: float
    beyond_sigma: float
    beyond_median: float
    hill: float
    hill_se: float
    largest: float
    peak: float
    effective_bits: float


def hill(largest: Float[Tensor, " k+1"]) -> tuple[float, float]:
    """Tail index from the k+1 largest values, largest first, and its standard error.

    `1/alpha = 1/k sum_{i<=k} ln(x_(i) / x_(k+1))`, Hill: A simple general approach to inference about the tail of a
    distribution, Annals of Statistics 1975. The standard error `alpha / sqrt(k)` holds for independent values of an
    exact power law beyond x_(k+1). Activations are neither: those of a token and of a channel go together, so it is a
    lower limit. NaN where fewer than two values above zero are given or all are equal.
    """
    values = largest.double()
    k = len(values) - 1
    if k < 1 or values[-1] <= 0:
        return math.nan, math.nan
    mean = (values[:-1] / values[-1]).log().mean().item()
    return (1 / mean, 1 / mean / k**0.5) if mean > 0 else (math.nan, math.nan)


def tails(values: Float[Tensor, "*any"]) -> Tails:
    """Tails of all numbers of a tensor, exact. Raises ValueError for an empty tensor and for values not finite.

    The median is the lower one where two could be.
    """
    x = values.detach().double().flatten()
    if x.numel() == 0 or not x.isfinite().all():
        raise ValueError("tails need finite values, and at least one")
    away, size = x - x.mean(), x.abs()
    sigma, median = away.square().mean().sqrt(), size.median()
    step = (size.max() / _levels()).clamp_min(1e-300)
    codes = torch.bincount(((x / step).round() + _levels()).long()).double()
    return _of(
        count=len(x),
        kurtosis=((away / sigma).pow(4).mean() - 3).item(),
        beyond_sigma=(away.abs() > SIGMAS * sigma).double().mean().item(),
        beyond_median=(size > MEDIANS * median).double().mean().item(),
        largest=size.topk(min(LARGEST, len(size))).values,
        median=median.item(),
        codes=codes,
    )


def tails_of(histogram: Histogram) -> Tails:
    """Tails of a stream.

    The kurtosis comes from sums of powers: of its digits, those are lost that `(mean / sigma)^4` takes.
    """
    count = histogram.count
    first, second, third, fourth = (histogram.powers / count).tolist()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    median = histogram.quantile(0.5)
    reach = SIGMAS * max(variance, 0.0) ** 0.5
    step = max(histogram.largest[0].item() / _levels(), 1e-300)
    places = (histogram.means / step).round().long()
    signs = torch.tensor([[-1], [1]])
    counts = histogram.counts[:, histogram.occupied]
    codes = torch.bincount((signs * places + _levels()).flatten(), weights=counts.flatten())
    return _of(
        count=count,
        kurtosis=central / variance**2 - 3 if variance > 0 else math.nan,
        beyond_sigma=_outside(histogram, first - reach, first + reach),
        beyond_median=_outside(histogram, -MEDIANS * median, MEDIANS * median),
        largest=histogram.largest,
        median=median,
        codes=codes,
    )


def normal_tails(count: int, generator: torch.Generator) -> Tails:
    """The null: tails of so many independent values of a normal law."""
    whole = None
    for start in range(0, count, 1 << 20):
        part = collect(torch.randn(min(1 << 20, count - start), generator=generator))
        whole = part if whole is None else whole + part
    return tails_of(whole)


def normal_tail(deviations: float) -> float:
    """Share of normal numbers farther than that from their mean: the null of `beyond_sigma`.

    Of `beyond_median` it is that of 20 times 0.6745 deviations, 2e-41.
    """
    return math.erfc(deviations / math.sqrt(2))


def _outside(histogram: Histogram, low: float, high: float) -> float:
    """Share of the values below `low` or above `high`."""
    return (histogram.above(-low, -1) + histogram.above(high)) / histogram.count


def _levels() -> int:
    return 2 ** (BITS - 1) - 1


def _of(*, largest: Tensor, median: float, codes: Tensor, **given: float) -> Tails:
    """What both ways share. Hill's index takes the largest tenth, of at most `LARGEST` values."""
    index, error = hill(largest[: max(2, min(len(largest), given["count"] // 10))])
    shares = codes[codes > 0] / codes.sum()
    top = largest[0].item()
    return Tails(
        **given,
        hill=index,
        hill_se=error,
        largest=top,
        peak=top / median if median > 0 else math.inf,
        effective_bits=-(shares * shares.log2()).sum().item(),
    )

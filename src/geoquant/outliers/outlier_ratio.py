"""How much of a site lies far out: of its weights times inputs, and of its inputs alone.

The outlier ratio of a layer is the share of `A_ij = |W_ij| ||x_j||` above M times their mean: Yin et al., Outlier
weighed layerwise sparsity (OWL), ICML 2024, on the score of Wanda (Sun et al., ICLR 2024). Its null has normal weights
of the same size and the same inputs; with `a_j = ||x_j||` and `u_j = M mean(a) sqrt(2 / pi) / a_j` the share is mean_j
`2 (1 - Phi(u_j))`, so that a ratio above it comes from the weights and not from uneven inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["MEANS", "OutlierRatio", "OutlierRatios", "Tails", "normal_tail", "outlier_ratio", "tails"]

MEANS = 5.0
DEVIATIONS = 6.0
MEDIANS = 20.0


@dataclass(frozen=True)
class Tails:
    """Of all numbers of a site's inputs together.

    six_sigma: share beyond six standard deviations of their mean. medians: share of |x| above 20 times its median.
    largest: of |x|, over that median. count: how many numbers. Normal numbers: `normal_tail`.
    """

    six_sigma: float
    medians: float
    largest: float
    count: int


def tails(x: Float[Tensor, "tokens in"], deviations: float = DEVIATIONS, medians: float = MEDIANS) -> Tails:
    """Exact counts, deviations in double precision."""
    # In single precision the difference of squares would lose a spread that is small beside the mean.
    mean = x.mean(dtype=torch.float64)
    variance = x.square().mean(dtype=torch.float64) - mean.square()
    sizes = x.abs()
    median = sizes.median().clamp_min(1e-30)
    far = (x - mean.float()).abs_() > deviations * variance.clamp_min(0).sqrt().float()
    return Tails(
        six_sigma=far.sum().item() / x.numel(),
        medians=(sizes > medians * median).sum().item() / x.numel(),
        largest=(sizes.max() / median).item(),
        count=x.numel(),
    )


def normal_tail(deviations: float) -> float:
    """Share of normal numbers farther than that from their mean: the null of `six_sigma`.

    Of `medians` it is that of 20 times 0.6745 deviations, 2e-41.
    """
    return math.erfc(deviations / math.sqrt(2))


def outlier_ratio(
    weights: Sequence[Float[Tensor, "out in"]], norms: Sequence[Float[Tensor, " in"]], means: float = MEANS
) -> tuple[float, float]:
    """Share of all `|W_ij| ||x_j||` of one or several matrices above `means` times their common mean, and its null.

    norms: of each matrix its inputs' `||x_j||` over tokens, or any multiple that is common to all.
    """
    pairs = list(zip(weights, norms, strict=True))
    count = sum(weight.numel() for weight in weights)
    limit = means * sum((weight.abs().sum(0) * norm).sum().item() for weight, norm in pairs) / count
    above = sum(((weight.abs() * norm) > limit).sum().item() for weight, norm in pairs)
    # A matrix's own size is kept: without it one with larger weights would look like a tail.
    sizes = [norm * weight.square().mean().sqrt() for weight, norm in pairs]
    normal = means * sum(s.sum().item() * len(w) for s, w in zip(sizes, weights)) * math.sqrt(2 / math.pi) / count
    null = sum(torch.erfc(normal / (s.clamp_min(1e-30) * 2**0.5)).sum().item() * len(w) for s, w in zip(sizes, weights))
    return above / count, null / count


@dataclass(frozen=True)
class OutlierRatio:
    """One site; site None: all of a block. ratio, null: see above. tails: of a site's inputs, None for a block."""

    site: str | None
    block: int
    kind: str
    ratio: float
    null: float
    tails: Tails | None


@dataclass(frozen=True)
class OutlierRatios:
    """Every site, and every block as a whole."""

    sites: tuple[OutlierRatio, ...]
    blocks: tuple[OutlierRatio, ...]

    def to_dict(self) -> dict:
        null = {"six_sigma": normal_tail(DEVIATIONS), "medians": normal_tail(MEDIANS * 0.6744897501960817)}
        return {"means": MEANS, "normal_tails": null} | {
            name: [asdict(item) for item in getattr(self, name)] for name in ("sites", "blocks")
        }

    def finding(self) -> str:
        if not self.sites:
            return "Outlier ratios: no site was reached."
        ratios = [block.ratio for block in self.blocks]
        most = max(self.blocks, key=lambda block: block.ratio)
        excess = torch.tensor([block.ratio / max(block.null, 1e-30) for block in self.blocks]).median().item()
        known = [site for site in self.sites if site.tails]
        far = max(known, key=lambda site: site.tails.six_sigma)
        high = max(known, key=lambda site: site.tails.largest)
        return (
            f"Outlier ratios: {min(ratios):.2%} to {most.ratio:.2%} of a block's |W| ||x|| exceed {MEANS:.0f} times "
            f"their mean (most in block {most.block}, where normal weights on the same inputs give {most.null:.2%}; "
            f"median over blocks {excess:.1f} times what these give); inputs beyond 6 deviations: at most "
            f"{far.tails.six_sigma:.3%} ({far.site}; normal numbers {normal_tail(DEVIATIONS):.0e}); the largest input "
            f"is {high.tails.largest:,.0f} times the median ({high.site})."
        )

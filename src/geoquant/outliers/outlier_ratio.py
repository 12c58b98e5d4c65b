"""How much of a site lies far out: of its weights times inputs, and of its inputs alone (tails.py).

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

from geoquant.outliers.tails import MEDIANS, SIGMAS, Tails, normal_tail

__all__ = ["MEANS", "OutlierRatio", "OutlierRatios", "outlier_ratio"]

MEANS = 5.0


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
    """One site; site None: all of a block. ratio, null: see above. tails: of a site's inputs, None for a block and
    for inputs that are not finite.
    """

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
        null = {"beyond_sigma": normal_tail(SIGMAS), "beyond_median": normal_tail(MEDIANS * 0.6744897501960817)}
        return {"means": MEANS, "normal_tails": null} | {
            name: [asdict(item) | {"tails": _plain(item.tails)} for item in getattr(self, name)]
            for name in ("sites", "blocks")
        }

    def finding(self) -> str:
        if not self.sites:
            return "Outlier ratios: no site was reached."
        ratios = [block.ratio for block in self.blocks]
        most = max(self.blocks, key=lambda block: block.ratio)
        excess = torch.tensor([block.ratio / max(block.null, 1e-30) for block in self.blocks]).median().item()
        return (
            f"Outlier ratios: {min(ratios):.2%} to {most.ratio:.2%} of a block's |W| ||x|| exceed {MEANS:.0f} times "
            f"their mean (most in block {most.block}, where normal weights on the same inputs give {most.null:.2%}; "
            f"median over blocks {excess:.1f} times what these give){self._inputs()}."
        )

    def _inputs(self) -> str:
        known = [site for site in self.sites if site.tails and math.isfinite(site.tails.peak)]
        if not known:
            return ""
        far = max(known, key=lambda site: site.tails.beyond_sigma)
        high = max(known, key=lambda site: site.tails.peak)
        return (
            f"; inputs beyond {SIGMAS:.0f} deviations: at most {far.tails.beyond_sigma:.3%} ({far.site}; normal "
            f"numbers {normal_tail(SIGMAS):.0e}); the largest input is {high.tails.peak:,.0f} times the median "
            f"({high.site})"
        )


def _plain(tails: Tails | None) -> dict | None:
    """For JSON: None stands for what is not finite."""
    if tails is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in asdict(tails).items()}

"""Reference values: what plain rounding does to the geometry of a layer, bit width by bit width.

Nobody can read an MD of 0.4 who does not know what is usual. These are the numbers of one architecture, layer by layer,
and their quartiles over all layers and over those of a kind; beside MD stands that of noise as long as the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.distortion import median_distortions
from geoquant.geometry.nulls import matched_noise
from geoquant.geometry.spectrum import spectrum_change
from geoquant.outliers.interventions import rounded

__all__ = ["MEASURES", "quartiles", "reference_values"]

MEASURES = {
    "relative_error": "length of the error over that of the weights",
    "distortion": "manifold distortion (MD), median over rows",
    "distortion_of_noise": "MD of noise as long as the error",
    "spectrum": "relative change of the singular values",
    "angle": "largest angle between the 32 leading input directions before and after, radians",
    "information": "divergence of the squared spectra, nats",
}
LARGEST = 2048  # of the shorter side: beyond it eigenvectors cost more than they tell


def reference_values(
    weight: Float[Tensor, "out in"], bits: Sequence[int], seed: int = 0
) -> dict[int, dict[str, float | None]]:
    """MEASURES of plain rounding to each bit width (nearest codes, groups of 64); None for what has no number."""
    errors = {one: rounded(weight, one) - weight for one in bits}
    generator = torch.Generator().manual_seed(seed)
    noises = {one: matched_noise(error, generator) for one, error in errors.items()}
    moved = median_distortions(weight, [*errors.values(), *noises.values()])
    found = {}
    for place, (one, error) in enumerate(errors.items()):
        values = {
            "relative_error": (error.norm() / weight.norm()).item(),
            "distortion": moved[place],
            "distortion_of_noise": moved[place + len(errors)],
        }
        if min(weight.shape) <= LARGEST and weight.any():
            change = spectrum_change(weight, weight + error)
            values |= {"spectrum": change.relative, "angle": max(change.angles), "information": change.kl}
        found[one] = {name: _number(values.get(name)) for name in MEASURES}
    return found


def _number(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and np.isfinite(value) else None


def quartiles(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Lower quartile, median and upper quartile of what is known, and how many that are."""
    known = [value for value in values if value is not None]
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75]).tolist() if known else (None, None, None)
    return {"low": _number(low), "median": _number(middle), "high": _number(high), "sites": len(known)}

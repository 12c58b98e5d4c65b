"""MD: how far the rounding error leaves the tangent space of the cloud of rows it lies in (geometry/distortion.py).

Rows are points; those asked are spread evenly, their neighbours are sought among all. Texts do not enter, so its
standard error is zero; its null is a matrix of the same weights and errors at shuffled places.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.distortion import distortion
from geoquant.geometry.tangent import NEIGHBOURS
from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "median_distortion"]

ROWS = 48


def median_distortion(context: SiteContext) -> Float[Tensor, ""]:
    """Median MD over `ROWS` rows; zero for a matrix of too few rows to have neighbours."""
    count = len(context.weight)
    neighbours = min(NEIGHBOURS, count - 1)
    if neighbours < 2:
        return context.weight.new_zeros(())
    rows = torch.linspace(0, count - 1, min(ROWS, count), device=context.weight.device).round().long()
    found = distortion(context.weight, context.delta, k=neighbours, rows=rows).md
    found = found[found.isfinite()]
    return found.median() if len(found) else context.weight.new_zeros(())


SCORES = (
    Score(
        "distortion",
        "manifold distortion of the rounding error (median)",
        "",
        "site",
        "mean",
        median_distortion,
        texts=(),
    ),
)

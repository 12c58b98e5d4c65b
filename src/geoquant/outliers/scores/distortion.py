"""MD: how far the rounding error leaves the tangent space of the cloud of rows it lies in (geometry/distortion.py).

Rows are points; those asked are spread evenly, their neighbours are sought among all. Texts do not enter, so its
standard error is zero; its null is a matrix of the same weights and errors at shuffled places.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.distortion import median_distortions
from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "median_distortion"]


def median_distortion(context: SiteContext) -> Float[Tensor, ""]:
    """Median MD; zero for a matrix of too few rows to have neighbours."""
    found = median_distortions(context.weight, (context.delta,))[0]
    return context.weight.new_tensor(0.0 if math.isnan(found) else found)


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

"""MD: how far the rounding error leaves the tangent space of the cloud of rows it lies in (geometry/distortion.py).

Rows are points; 48 are asked, spread evenly, their neighbours are sought among all. Texts do not enter: the standard
error is that of the median of as many rows (`outliers.sample`), those asked taken for independent, though they share
neighbours: on random matrices of 200 rows it is a tenth too small, of 60 rows a sixth to a third. Its null is a matrix
of the same weights and errors at shuffled places.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.distortion import sampled_distortions
from geoquant.outliers.context import SiteContext
from geoquant.outliers.derived import remembered
from geoquant.outliers.sample import median_error
from geoquant.outliers.score import Score

__all__ = ["SCORES", "median_distortion"]


def median_distortion(context: SiteContext) -> Float[Tensor, ""]:
    """Median MD; zero for a matrix of too few rows to have neighbours."""
    found = remembered(_asked, context.weight, context.delta)
    return found.median() if len(found) else context.weight.new_zeros(())


def _asked(weight: Float[Tensor, "out in"], delta: Float[Tensor, "out in"]) -> Float[Tensor, " rows"]:
    return sampled_distortions(weight, (delta,))[0]


def _error(context: SiteContext) -> Float[Tensor, " 1"]:
    """Of the median over the rows asked."""
    return torch.tensor([median_error(remembered(_asked, context.weight, context.delta))])


SCORES = (
    Score(
        "distortion",
        "manifold distortion of the rounding error (median)",
        "",
        "site",
        "mean",
        median_distortion,
        texts=(),
        error=_error,
    ),
)

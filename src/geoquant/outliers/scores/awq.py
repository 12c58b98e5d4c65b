"""AWQ's salience: the mean size of a column's inputs, whatever its weights are.

    E |x_j|

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: activation-aware weight quantization, MLSys 2024. Taken
from the histogram, each bin at its middle: within 11% of every single |x| outside the bin around zero, and of the mean
within a percent or so. |x| beyond the last bin counts as its inner edge (548 units), and so too little.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score
from geoquant.outliers.statistics import BINS, edges

__all__ = ["SCORES", "salience"]


def salience(context: SiteContext) -> Float[Tensor, " in"]:
    """E |x_j|, in units of the input."""
    borders = edges(context.public.unit)
    sizes = ((borders[1:] + borders[:-1]) / 2).abs()
    sizes[BINS // 2] = borders[BINS // 2 + 1] / 2  # of |x|, evenly spread on both sides of zero
    sizes[0], sizes[-1] = borders[1].abs(), borders[-2].abs()
    histogram = context.public.mean("histogram")
    return histogram @ sizes.to(histogram)


SCORES = (
    Score(
        "awq",
        "mean size of a column's inputs",
        "input",
        "column",
        "mean",
        salience,
        paper="AWQ, Lin et al., MLSys 2024",
    ),
)

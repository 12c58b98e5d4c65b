"""AWQ's salience: the mean size of a column's inputs, whatever its weights are.

    E |x_j|

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: activation-aware weight quantization, MLSys 2024. Taken
from the histogram, each bin at its middle: a single |x| is off by 0.12 sqrt(unit^2 + x^2) at most, the mean of a column
by 3% where it is at least 0.3 units. Never above the root mean square, which is what columns of smaller inputs get. |x|
beyond the last bin counts as in it (495 units), and so too little.
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
    histogram = context.public.mean("histogram")
    return (histogram @ sizes.to(histogram)).minimum(context.public.mean("hessian").diagonal().sqrt())


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

"""OWQ's sensitivity of an input column, by which it chooses the columns to keep.

    lambda_j ||delta_:j||^2,    lambda_j = A_jj

Lee, Jin, Kim, Kim, Park: OWQ: outlier-aware weight quantization, AAAI 2024 (there lambda is the diagonal of 2 X X^T, so
twice this). The same number as HOP's self error summed over a column: under its own name, so that whoever looks for the
method finds it, and no second piece of evidence.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score
from geoquant.outliers.scores.hop import PLAIN

__all__ = ["SCORES", "owq"]


def owq(context: SiteContext) -> Float[Tensor, " in"]:
    """A_jj ||delta_:j||^2."""
    return context.delta.square().sum(0) * context.public.mean("hessian").diagonal()


SCORES = (
    Score(
        "owq",
        "OWQ's sensitivity of a column (HOP's self error)",
        PLAIN,
        "column",
        "sum",
        owq,
        paper="OWQ, Lee et al., AAAI 2024",
    ),
)

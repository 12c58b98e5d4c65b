"""How far the outputs move when the weights are rounded.

SensiBoost ranks layers by the mean squared error of their outputs under rounded weights:

    1 / out * sum_i delta_i^T A delta_i

Zhang, Liu, Li, Lv, Wang, Bai: Towards superior quantization accuracy: a layer-sensitive approach, arXiv 2503.06518
(2025). The authors look at the output of attention as a whole and round with HQQ; here it is every site's own output
and the context's own error, so that numbers of the two do not compare. Up to the number of rows it is HOP's row error.

Relative to the outputs themselves, `tr(delta A delta^T) / tr(W A W^T)`, it has no unit; measured, it ranks layers of
one model badly (it stands here to be judged with the others).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.derived import row_energies
from geoquant.outliers.score import Score
from geoquant.outliers.scores.hop import PLAIN, hop_row

__all__ = ["SCORES", "relative_error"]


def relative_error(context: SiteContext) -> Float[Tensor, ""]:
    """Share of the output's energy that the error makes; zero for a site without outputs."""
    error, energy = (row_energies(one, context.public.hessian).sum() for one in (context.delta, context.weight))
    return error / energy if energy > 0 else error * 0


SCORES = (
    Score(
        "sensitivity",
        "mean squared error of an output under rounded weights",
        PLAIN,
        "row",
        "mean",
        hop_row,
        paper="SensiBoost, arXiv 2503.06518",
    ),
    Score("sensitivity_relative", "output error over output energy", "", "site", "mean", relative_error),
)

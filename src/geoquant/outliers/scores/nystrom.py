"""Low-rank Fisher: what an error costs along the few directions in which the parts of a text pull.

    1/2 delta_ij (F delta)_ij,    F = 1 / tokens * sum_s g_s g_s^T

in nats per token, with g_s (out, in) the gradient of the summed loss of part s of the public text, flattened, and F cut
to the fewest eigenvectors that hold 99% of its trace. It sees what no diagonal sees: errors that add up or cancel.
Weights sum to the site's cost, which is never negative; one weight's share may be, where its error makes up for those
of others.

One part per sequence makes F the empirical Fisher of sequences; longer parts make it coarser, and S parts have rank S
at most: a site's cost is then that of a few of all directions, good for comparing, not as an estimate of the loss.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.nystrom import low_rank
from geoquant.outliers.score import Score

__all__ = ["SCORES", "fisher_low_rank"]


def fisher_low_rank(context: SiteContext) -> Float[Tensor, "out in"]:
    """Each weight's share of the cost."""
    factor = low_rank(context.gradients / max(context.public.tokens, 1.0) ** 0.5)
    return context.delta * factor.apply(context.delta) / 2


SCORES = (
    Score(
        "fisher_low_rank",
        "low-rank Fisher cost of the rounding error",
        "nats per token",
        "weight",
        "sum",
        fisher_low_rank,
        ("gradients",),
    ),
)

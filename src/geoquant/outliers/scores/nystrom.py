"""Low-rank Fisher: what an error costs along the few directions in which the parts of a text pull.

    1/2 delta_ij (F delta)_ij,    F = 1 / tokens * sum_s g_s g_s^T

in nats per token, with g_s (out, in) the gradient of the summed loss of part s of a text, flattened, and F cut
to the fewest eigenvectors that hold 99% of its trace. It sees what no diagonal sees: errors that add up or cancel.
Weights sum to the site's cost, which is never negative; one weight's share may be, where its error makes up for those
of others.

One part per sequence makes F the empirical Fisher of sequences; longer parts make it coarser, and S parts have rank S
at most: a site's cost is then that of a few of all directions, good for comparing, not as an estimate of the loss.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.nystrom import low_rank_product
from geoquant.outliers.score import Score

__all__ = ["SCORES", "fisher_low_rank"]


def fisher_low_rank(context: SiteContext, text: str = "public") -> Float[Tensor, "out in"]:
    """Each weight's share of the cost on one of the context's texts."""
    gradients, tokens = getattr(context, f"{text}_gradients"), getattr(context, text).tokens
    return context.delta * low_rank_product(gradients, context.delta) / (2 * max(tokens, 1.0))


SCORES = tuple(
    Score(
        f"fisher_low_rank{suffix}",
        f"low-rank Fisher cost of the rounding error on {what}",
        "nats per token",
        "weight",
        "sum",
        partial(fisher_low_rank, text=text),
        needs,
        texts=(text,),
    )
    for suffix, text, what, needs in (
        ("", "public", "public text", ("public_gradients",)),
        ("_private", "private", "private records", ("private", "private_gradients")),
        ("_domain", "domain", "unseen records of the same kind", ("domain", "domain_gradients")),
    )
)

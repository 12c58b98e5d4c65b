"""Diagonal empirical Fisher: what an error costs if every weight were alone.

    1/2 F_ij delta_ij^2,    F_ij = mean over tokens of g_i^2 x_j^2

in nats per token: the second-order estimate with the Gauss-Newton matrix replaced by the diagonal of the empirical
Fisher, true next tokens in place of the model's own. g is the gradient, at one token's output, of the loss of the whole
sequence. On public text it says what function loses; on private and on unseen records of the same kind, what these
lose. Where the model knows a text by heart its gradients vanish, and this with them.

What the empirical Fisher is not: Kunstner, Balles, Hennig: Limitations of the empirical Fisher approximation for
natural gradient descent, NeurIPS 2019.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "fisher"]


def fisher(context: SiteContext, text: str = "public") -> Float[Tensor, "out in"]:
    """The cost of each weight's error on one of the context's texts."""
    return context.delta.square() * getattr(context, text).mean("fisher") / 2


SCORES = (
    Score(
        "fisher", "diagonal Fisher cost of the rounding error on public text", "nats per token", "weight", "sum", fisher
    ),
    *(
        Score(
            f"fisher_{text}",
            f"diagonal Fisher cost of the rounding error on {what}",
            "nats per token",
            "weight",
            "sum",
            partial(fisher, text=text),
            (text,),
            texts=(text,),
        )
        for text, what in (("private", "private records"), ("domain", "unseen records of the same kind"))
    ),
)

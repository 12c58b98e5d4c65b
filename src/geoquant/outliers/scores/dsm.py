"""DSM: the diagonal second-order estimate of what an error costs.

    1/2 (tr G / out) A_jj delta_ij^2

in nats per token, with A and G means over tokens. Curvature, size of the weights and scale of the activations, which
the literature multiplies, are its factors.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "dsm"]


def dsm(context: SiteContext) -> Float[Tensor, "out in"]:
    """The estimate, weight by weight."""
    public = context.public
    curvature = public.mean("output").mean()
    return context.delta.square() * public.mean("hessian").diagonal() * (curvature / 2)


SCORES = (Score("dsm", "diagonal second-order cost of the rounding error", "nats per token", "weight", "sum", dsm),)

"""How much of an error lies where the inputs hardly go: the share of it outside the leading eigenvectors of the inputs'
second moments that hold 95% of their energy, and how many these are.

The share is larger where inputs fill fewer dimensions, for any error: its null, shuffled errors, says how much of it is
that. The null of the dimension has independent inputs of the same energies.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.derived import eigenpairs
from geoquant.outliers.own_nulls import independent_inputs
from geoquant.outliers.score import Score

__all__ = ["SCORES", "input_dimension", "outside"]

ENERGY = 0.95


def _leading(metric: Float[Tensor, "in in"]) -> Float[Tensor, "in k"]:
    """The fewest eigenvectors that hold `ENERGY` of the trace."""
    values, vectors = eigenpairs(metric)
    held = values.clamp_min(0).flip(0).cumsum(0)
    count = int((held < ENERGY * held[-1]).sum()) + 1
    return vectors[:, -count:]


def outside(context: SiteContext) -> Float[Tensor, ""]:
    """Share of the error's squares outside the leading eigenvectors; zero for no error."""
    inside = (context.delta @ _leading(context.public.hessian)).square().sum()
    whole = context.delta.square().sum()
    return (1 - inside / whole.clamp_min(1e-30)).clamp(0, 1) if whole > 0 else whole


def input_dimension(context: SiteContext) -> Float[Tensor, ""]:
    """Minus the share of dimensions that hold 95% of the inputs' energy: few are said to make a site sensitive."""
    values = eigenpairs(context.public.hessian)[0].clamp_min(0).flip(0).cumsum(0)
    return -((values < ENERGY * values[-1]).sum() + 1) / len(values)


SCORES = (
    Score("outside", "share of the rounding error where inputs hardly go", "", "site", "mean", outside),
    Score(
        "input_dimension",
        "how few dimensions hold the inputs (minus their share)",
        "",
        "site",
        "mean",
        input_dimension,
        null=independent_inputs,
    ),
)

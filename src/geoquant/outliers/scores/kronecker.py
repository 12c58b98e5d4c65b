"""Kronecker-factored second-order cost of an error, gradients and inputs taken for independent.

    1/2 sum_i G_ii delta_i^T A delta_i                 plain:    G (x) A
    1/2 sum_i (G_ii / tr G) delta_i^T A_g delta_i      weighted: (G / tr G) (x) A_g

in nats per token, with G = E g g^T, of which the diagonal is known, A = E x x^T, and A_g = E ||g||^2 x x^T, which
holds tr G already: G (x) A_g would count it twice. Where ||g|| and x are independent the two agree.

Martens and Grosse: Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "kronecker_rows", "kronecker_weights"]


def _factors(context: SiteContext, metric: str) -> tuple[Float[Tensor, " out"], Float[Tensor, "in in"]]:
    """The output factor that pairs with the input factor `hessian` (A) or `weighted` (A_g), and that."""
    output = context.public.mean("output")
    if metric == "weighted":
        output = output / output.sum().clamp_min(1e-30)
    return output, context.public.mean(metric)


def kronecker_rows(context: SiteContext, metric: str) -> Float[Tensor, " out"]:
    """The cost of each row's error."""
    output, inputs = _factors(context, metric)
    return output * ((context.delta @ inputs) * context.delta).sum(1).clamp_min(0) / 2


def kronecker_weights(context: SiteContext, metric: str) -> Float[Tensor, "out in"]:
    """The cost of each weight's error alone: the diagonal of both factors."""
    output, inputs = _factors(context, metric)
    return output[:, None] * context.delta.square() * (inputs.diagonal() / 2)


SCORES = tuple(
    Score(f"kronecker_{axis}{suffix}", f"Kronecker-factored cost of {what}", "nats per token", axis, "sum", compute)
    for suffix, metric, how in (("", "weighted", ""), ("_plain", "hessian", ", all tokens alike"))
    for axis, what, compute in (
        ("row", f"a row's rounding error{how}", partial(kronecker_rows, metric=metric)),
        ("weight", f"each weight's rounding error alone{how}", partial(kronecker_weights, metric=metric)),
    )
)

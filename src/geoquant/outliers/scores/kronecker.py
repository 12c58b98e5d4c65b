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
from geoquant.outliers.derived import row_energies
from geoquant.outliers.score import Score
from geoquant.outliers.statistics import Statistics

__all__ = ["SCORES", "kronecker_rows", "kronecker_weights"]


def _output(seen: Statistics, metric: str) -> Float[Tensor, " out"]:
    """The output factor that pairs with the sum over tokens of the input factor `hessian` (A) or `weighted` (A_g)."""
    whole = max(seen.tokens, 1.0) if metric == "hessian" else seen.output.sum().clamp_min(1e-30)
    return seen.output / whole / max(seen.tokens, 1.0)


def kronecker_rows(context: SiteContext, metric: str = "weighted", text: str = "public") -> Float[Tensor, " out"]:
    """The cost of each row's error on one of the context's texts."""
    seen = getattr(context, text)
    return _output(seen, metric) * row_energies(context.delta, getattr(seen, metric)) / 2


def kronecker_weights(context: SiteContext, metric: str = "weighted", text: str = "public") -> Float[Tensor, "out in"]:
    """The cost of each weight's error alone: the diagonal of both factors."""
    seen = getattr(context, text)
    return _output(seen, metric)[:, None] * context.delta.square() * (getattr(seen, metric).diagonal() / 2)


SCORES = tuple(
    Score(
        f"kronecker_{axis}{suffix}",
        f"Kronecker-factored cost of {what}{where}",
        "nats per token",
        axis,
        "sum",
        partial(compute, metric=metric, text=text),
        () if text == "public" else (text,),
        texts=(text,),
    )
    for suffix, metric, text, where in (
        ("", "weighted", "public", ""),
        ("_plain", "hessian", "public", ", all tokens alike"),
        ("_private", "weighted", "private", " on private records"),
        ("_domain", "weighted", "domain", " on unseen records of the same kind"),
    )
    for axis, what, compute in (
        ("row", "a row's rounding error", kronecker_rows),
        ("weight", "each weight's rounding error alone", kronecker_weights),
    )
)

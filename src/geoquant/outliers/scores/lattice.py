"""The shape of the lattice that a site's inputs define, without any error: what the literature ranks layers by.

`A + 0.01 mean(diag A) I = R^T R`; column j of R is the j-th basis vector, of length `|b_j| = sqrt(A_jj)` and of length
`r_j = R_jj` beside those before it.

lattice_defect: `(1/c) sum_j ln(|b_j| / r_j)`, zero for an orthogonal basis, whatever the units and the order.
lattice_eta:    `(1/c) sum_j r_j`, which was proposed for the same purpose; it scales with the inputs' unit and depends
                on the order of columns (here as they come), so it is no defect. Kept to be compared.

Both know nothing of weights. Their null has independent inputs of the same energies, over as many tokens: a basis of
few tokens is never orthogonal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.derived import remembered
from geoquant.outliers.own_nulls import independent_inputs
from geoquant.outliers.score import Score

__all__ = ["SCORES", "lattice_defect", "lattice_eta"]

DAMPING = 0.01


def _lengths(hessian: Float[Tensor, "in in"]) -> tuple[Float[Tensor, " in"], Float[Tensor, " in"]]:
    """|b_j| and r_j; ones without inputs. More damping where rounding left a metric that is not positive."""
    metric = hessian.double()
    typical = metric.diagonal().mean()
    if not typical > 0:
        return metric.new_ones(len(metric)), metric.new_ones(len(metric))
    for damping in (DAMPING, 0.1, 1.0, 10.0):
        damped = metric + damping * typical * torch.eye(len(metric)).to(metric)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
    return damped.diagonal().sqrt(), factor.diagonal().clamp_min(1e-30)


def lattice_defect(context: SiteContext) -> Float[Tensor, ""]:
    """Mean log orthogonality defect."""
    lengths, own = remembered(_lengths, context.public.hessian)
    return (lengths / own).log().mean().float()


def lattice_eta(context: SiteContext) -> Float[Tensor, ""]:
    """Mean Gram-Schmidt length."""
    _, own = remembered(_lengths, context.public.hessian)
    return (own.mean() / max(context.public.tokens, 1.0) ** 0.5).float()


SCORES = (
    Score(
        "lattice_defect",
        "orthogonality defect of the lattice of inputs",
        "",
        "site",
        "mean",
        lattice_defect,
        null=independent_inputs,
    ),
    Score(
        "lattice_eta",
        "mean Gram-Schmidt length of the lattice of inputs",
        "input",
        "site",
        "mean",
        lattice_eta,
        null=independent_inputs,
    ),
)

"""HOP: what an error costs at the site's own output, the Hessian-orthogonal projection of the error.

    E ||delta x||^2 = tr(delta A delta^T) = sum_i delta_i^T A delta_i

with A the mean over tokens of x x^T. Three readings of it:

self          A_jj delta_ij^2, of one weight with all others exact; of a column A_jj ||delta_:j||^2.
compensated   ||delta_:j||^2 / [A^-1]_jj, of one column when all others then adapt to it as well as they can. A is
              damped by 1% of its mean diagonal, as it is when codes are chosen. Never above the self error (of the
              damped A). What columns cost together is not the sum of these.
row           delta_i^T A delta_i, of one output row, exactly; rows sum to the site.

Plain A counts squared outputs, in whatever unit these have; measured, it is ruled by massive tokens and ruins an
allocation of bits. Weighted A_g = E ||g||^2 x x^T counts `E ||g||^2 ||delta x||^2`: by Cauchy and Schwarz never below
`E (g^T delta x)^2`, which is twice the second-order cost in nats.

Compensation: Hassibi and Stork: Second order derivatives for network pruning: optimal brain surgeon, NIPS 1992.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.derived import remembered, row_energies
from geoquant.outliers.score import Score

__all__ = ["DAMPING", "SCORES", "hop_compensated", "hop_row", "hop_self"]

DAMPING = 0.01  # of the mean diagonal


def hop_self(context: SiteContext, metric: str = "hessian") -> Float[Tensor, "out in"]:
    """Cost of each weight's error alone, in the metric `hessian` (A) or `weighted` (A_g)."""
    return context.delta.square() * context.public.mean(metric).diagonal()


def hop_compensated(context: SiteContext, metric: str = "hessian") -> Float[Tensor, " in"]:
    """Cost of each column's error after all other columns have adapted; zero for a site without inputs."""
    matrix = getattr(context.public, metric)
    if not matrix.diagonal().sum() > 0:
        return torch.zeros_like(context.delta[0])
    # Of the sum over tokens, whose inverse is that of the mean divided by their number.
    inverse = remembered(_inverse_diagonal, matrix).to(matrix.dtype) * max(context.public.tokens, 1.0)
    return context.delta.square().sum(0) / inverse


def _inverse_diagonal(matrix: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """The diagonal of the damped inverse.

    With a unit diagonal single precision is enough (four digits, on metrics that one token rules). Where it finds the
    matrix indefinite, that is taken for rounding and eigenvalues below zero for zero, in double precision.
    """
    damping = DAMPING * matrix.diagonal().mean()
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    scale = damped.diagonal().rsqrt()
    lower, failed = torch.linalg.cholesky_ex(damped * scale[:, None] * scale)
    if failed:
        values, vectors = torch.linalg.eigh(matrix.double())
        return (vectors.square() / (values.clamp_min(0) + damping)).sum(1)
    return torch.cholesky_inverse(lower).diagonal() * scale.square()


def hop_row(context: SiteContext, metric: str = "hessian") -> Float[Tensor, " out"]:
    """Cost of each row's error."""
    return row_energies(context.delta, getattr(context.public, metric)) / max(context.public.tokens, 1.0)


PLAIN, WEIGHTED = "squared output per token", "squared nats per token"

SCORES = (
    Score("hop_self", "output error of each weight's rounding alone", PLAIN, "weight", "sum", hop_self),
    Score(
        "hop_compensated",
        "output error of a column's rounding after the others adapt",
        PLAIN,
        "column",
        "sum",
        hop_compensated,
    ),
    Score("hop_row", "output error of a row's rounding", PLAIN, "row", "sum", hop_row),
    Score(
        "hop_self_weighted",
        "output error of each weight's rounding alone, tokens weighted by what they matter",
        WEIGHTED,
        "weight",
        "sum",
        partial(hop_self, metric="weighted"),
    ),
    Score(
        "hop_compensated_weighted",
        "output error of a column's rounding after the others adapt, tokens weighted by what they matter",
        WEIGHTED,
        "column",
        "sum",
        partial(hop_compensated, metric="weighted"),
    ),
    Score(
        "hop_row_weighted",
        "output error of a row's rounding, tokens weighted by what they matter",
        WEIGHTED,
        "row",
        "sum",
        partial(hop_row, metric="weighted"),
    ),
)

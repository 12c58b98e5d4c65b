"""The lattice basis of a layer: triangular factors of the damped metric.

With columns in processing order, `A + lambda*mean(diag A)*I = V V^T` with V upper triangular, and `U = V^-1`
satisfies `(A + ...)^-1 = U^T U`. Column j, processed when columns 0..j-1 are fixed, has Gram-Schmidt length
`r_j = V_jj = 1 / U_jj`: the distance of its input from the span of the inputs that come after it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["NotPositiveDefinite", "compensation_factor", "damped", "expected_error", "permuted", "triangular_inverse"]


class NotPositiveDefinite(ValueError):
    """The damped metric has no Cholesky factor (NaN moments, or damping far too small)."""


def damped(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """`A + damping * mean(diag A) * I`; the identity when no input ever fires: then any code is right."""
    mean = hessian.diagonal().mean()
    result = hessian.clone()
    result.diagonal().add_(torch.where(mean == 0, 1.0, damping * mean))
    return result


def compensation_factor(
    hessian: Float[Tensor, "n n"],
    order: Int[Tensor, " n"],
    damping: float,
    *,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, "n n"]:
    """`U` upper triangular with `(A + damping)^-1 = U^T U`, rows and columns in processing order.

    The reversed matrix has a lower Cholesky factor whose reversal is V; its inverse comes by halving, so that the
    work is matrix products. Float64 by default: damped metrics reach condition numbers of 1e6.

    Raises NotPositiveDefinite.
    """
    matrix = permuted(damped(hessian, damping).to(precision), order.flip(0))
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item() or not torch.isfinite(lower.diagonal()).all():
        raise NotPositiveDefinite(f"metric of {len(order)} columns is not positive definite at damping {damping}")
    return triangular_inverse(lower).flip(0, 1).to(hessian.dtype).contiguous()


def permuted(symmetric: Float[Tensor, "n n"], order: Int[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """Rows and columns of a symmetric matrix in `order`: two gathers of rows, several times faster than of columns."""
    return symmetric.index_select(0, order).T.contiguous().index_select(0, order)


def triangular_inverse(lower: Float[Tensor, "n n"], base: int = 128) -> Float[Tensor, "n n"]:
    """Inverse of a lower triangular matrix by halving: `[[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']]`."""
    size = len(lower)
    if size <= base:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    result = torch.zeros_like(lower)
    result[:half, :half] = triangular_inverse(lower[:half, :half], base)
    result[half:, half:] = triangular_inverse(lower[half:, half:], base)
    result[half:, :half] = -(result[half:, half:] @ lower[half:, :half] @ result[:half, :half])
    return result


def expected_error(
    factor: Float[Tensor, "rounded n"], metric: Float[Tensor, "n n"], *, stride: int = 1
) -> Float[Tensor, " m"]:
    """What one unit of squared rounding error in a processed column costs under `metric` (both in processing order).

    factor: the rows of `U` that belong to rounded columns; those of free columns, which come last, are left out.

    Babai leaves `w - q = sum_j (eps_j / U_jj) U_j:` with eps_j the rounding error of column j. Independent eps_j
    therefore cost `sum_j E[eps_j^2] (U M U^T)_jj / U_jj^2`; this returns the factor of every `stride`-th term. With M
    the (damped) metric that U was made from it is `r_j^2`; with M from other tokens it is the price of over-fitting,
    and the damping that minimises its sum needs no trial solve.
    """
    rows = factor[::stride]
    return ((rows @ metric) * rows).sum(1) / factor.diagonal()[::stride].square()

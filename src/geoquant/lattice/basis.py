"""The lattice basis of a layer: triangular factors of the damped metric.

With columns in processing order, `A + lambda*mean(diag A)*I = V V^T` with V upper triangular, and `U = V^-1`
satisfies `(A + ...)^-1 = U^T U`. Column j, processed when columns 0..j-1 are fixed, has Gram-Schmidt length
`r_j = V_jj = 1 / U_jj`: the distance of its input from the span of the inputs that come after it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "NotPositiveDefinite",
    "cholesky",
    "compensation_factor",
    "damped",
    "error_spread",
    "expected_error",
    "heldout_prices",
    "metric_factor",
    "permuted",
    "sample_stride",
    "triangular_inverse",
]

SAMPLED = 96  # columns; they tell two dampings apart as well as all


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
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n n"]:
    """`U` upper triangular with `(A + damping)^-1 = U^T U`, rows and columns in processing order.

    The reversed matrix has a lower Cholesky factor whose reversal is V (`metric_factor`); its inverse comes by halving,
    so that the work is matrix products. Computed in `dtype`: damped metrics reach condition numbers of 1e6.

    Raises NotPositiveDefinite.
    """
    # Double precision only between the two reorderings: these matrices are the largest of a run.
    return triangular_inverse(_reversed_factor(hessian, order, damping, dtype)).to(hessian.dtype).flip(0, 1)


def metric_factor(
    hessian: Float[Tensor, "n n"],
    order: Int[Tensor, " n"],
    damping: float,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n n"]:
    """`V` upper triangular with `A + damping = V V^T`, rows and columns in processing order: the basis itself, for half
    the work of `compensation_factor`. Raises NotPositiveDefinite.
    """
    return _reversed_factor(hessian, order, damping, dtype).to(hessian.dtype).flip(0, 1)


def _reversed_factor(hessian: Tensor, order: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    return cholesky(permuted(damped(hessian, damping), order.flip(0)).to(dtype), damping)


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


def error_spread(
    basis: Float[Tensor, "n n"], order: Int[Tensor, " n"], sides: Float[Tensor, " n"], probes: int = 32
) -> Float[Tensor, " n"]:
    """Twelve times the expected squared error that Babai leaves in each weight of a row, estimated.

    It is `sum_k (U_kj r_k s_k)^2`: every column hands its rounding on. sides: `r_k s_k`, in the original order as the
    result. Equal sides make it their square times the diagonal of the inverse metric. From `probes` products of
    `U^T` with normal numbers, for `probes / n` of the work of an inverse; the standard deviation is
    `sqrt(2 / probes)` of each entry, a quarter at 32. Seeded.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(basis), probes, generator=generator).to(basis) * sides[order, None]
    found = torch.linalg.solve_triangular(basis.T, noise, upper=False).square().mean(1)
    return torch.empty_like(found).index_copy_(0, order, found)


def expected_error(
    rows: Float[Tensor, "m n"], pivots: Float[Tensor, " m"], metric: Float[Tensor, "n n"]
) -> Float[Tensor, " m"]:
    """What one unit of squared rounding error in a processed column costs under `metric`.

    rows: rows of `U`, one per column asked for, in the column order of `metric`. pivots: their diagonal entries.

    Babai leaves `w - q = sum_j (eps_j / U_jj) U_j:` with eps_j the rounding error of column j. Independent eps_j
    therefore cost `sum_j E[eps_j^2] (U M U^T)_jj / U_jj^2`; this returns the factors. With M the (damped) metric that
    U was made from they are `r_j^2`; with M from other tokens they are the price of over-fitting, and the damping that
    minimises their sum needs no trial solve.
    """
    return ((rows @ metric) * rows).sum(1) / pivots.square()


def heldout_prices(
    metric: Float[Tensor, "n n"], heldout: Float[Tensor, "n n"], damping: float, *, free: int = 0, stride: int = 1
) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """`expected_error` under `heldout` of every `stride`-th rounded column after solving with the damped `metric`,
    and the Gram-Schmidt lengths of all columns.

    Both matrices come in *reversed* processing order, which is the order of the Cholesky factor, so that the `free`
    columns, processed last, stand first. Works in their precision. Raises NotPositiveDefinite.
    """
    lower = cholesky(damped(metric, damping), damping)
    chosen = torch.arange(free, len(lower), stride, device=lower.device)
    picks = torch.zeros(len(chosen), len(lower), dtype=lower.dtype, device=lower.device)
    picks[torch.arange(len(chosen), device=lower.device), chosen] = 1.0
    rows = torch.linalg.solve_triangular(lower, picks, upper=False, left=False)
    lengths = lower.diagonal()
    return expected_error(rows, lengths[chosen].reciprocal(), heldout), lengths


def sample_stride(columns: int) -> int:
    """Every how many columns `heldout_prices` is asked where sums are only compared with each other."""
    return max(4, columns // SAMPLED)


def cholesky(matrix: Float[Tensor, "n n"], damping: float, panel: int = 128) -> Float[Tensor, "n n"]:
    """Lower factor, panel by panel: one product with all that is to its left, then a small factor.

    Half the time of LAPACK's for the sizes of a layer on a CPU, whose work is not in products of this shape.
    Written over `matrix`. Raises NotPositiveDefinite.
    """
    size = len(matrix)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        matrix[start:, start:stop].addmm_(matrix[start:, :start], matrix[start:stop, :start].T, alpha=-1.0)
        small, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if info.item() or not torch.isfinite(small.diagonal()).all():
            raise NotPositiveDefinite(f"metric of {size} columns is not positive definite at damping {damping}")
        matrix[start:stop, start:stop] = small
        if stop < size:
            identity = torch.eye(stop - start, dtype=matrix.dtype, device=matrix.device)
            inverse = torch.linalg.solve_triangular(small, identity, upper=False)
            matrix[stop:, start:stop] = matrix[stop:, start:stop] @ inverse.T
    return matrix.tril_()

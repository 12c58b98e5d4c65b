"""Orders in which Babai processes the input columns. Every order here is a permutation: the integer box stays a box.

natural:      as stored.
activation:   largest diag(A) first (GPTQ's act-order, Frantar et al. 2022).
group-aware:  whole groups by their mean diag(A), largest first, and by diag(A) inside each group: groups stay
              contiguous, so their scales can be searched on up-to-date weights and no reader needs an index.
min-pivot:    sorted QR from the other end (Wuebben et al. 2001): the column with the smallest residual norm is
              processed last, then the smallest given that one, and so on; Lovasz' condition holds by construction
              (for the metric at 1% damping; columns that `last` moves to the end are exempt).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.basis import damped

__all__ = ["ALONE", "ORDERS", "column_order"]


def natural(hessian: Float[Tensor, "n n"], group_size: int) -> Int[Tensor, " n"]:
    """Columns as stored."""
    return torch.arange(len(hessian), device=hessian.device)


def activation(hessian: Float[Tensor, "n n"], group_size: int) -> Int[Tensor, " n"]:
    """Largest input energy first."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def group_aware(hessian: Float[Tensor, "n n"], group_size: int) -> Int[Tensor, " n"]:
    """Groups by mean input energy, and columns inside a group by theirs."""
    diagonal = hessian.diagonal()
    columns = len(diagonal)
    group = torch.arange(columns, device=diagonal.device) // group_size
    sums = torch.zeros(int(group[-1]) + 1, dtype=diagonal.dtype, device=diagonal.device).index_add_(0, group, diagonal)
    means = sums / torch.bincount(group)
    # Ranks, not means: groups with equal means must not interleave.
    rank = torch.argsort(torch.argsort(means, descending=True, stable=True))
    inside = torch.argsort(diagonal, descending=True, stable=True)
    return inside[torch.argsort(rank[group[inside]], stable=True)]


def min_pivot(hessian: Float[Tensor, "n n"], group_size: int) -> Int[Tensor, " n"]:
    """Right-looking Cholesky with minimum-diagonal pivoting; O(n^3), the last pivot is processed first."""
    residual = damped(hessian.double(), 0.01)
    columns = len(residual)
    left = torch.full((columns,), 0.0, dtype=torch.float64, device=hessian.device)
    pivots = []
    for _ in range(columns):
        pivot = int(torch.argmin(residual.diagonal() + left))
        pivots.append(pivot)
        left[pivot] = torch.inf
        row = residual[pivot] / residual[pivot, pivot].sqrt()
        residual.addr_(row, row, alpha=-1.0)
    return torch.tensor(pivots[::-1], device=hessian.device)


ALONE = "none"  # of methods in which no column compensates for another

ORDERS = {"natural": natural, "activation": activation, "group-aware": group_aware, "min-pivot": min_pivot}


def column_order(
    name: str, hessian: Float[Tensor, "n n"], group_size: int, last: Int[Tensor, " k"] | None = None
) -> Int[Tensor, " n"]:
    """Processing order of the columns; those in `last` come at the end (kept columns absorb every error)."""
    order = ORDERS[name](hessian, group_size)
    if last is None or not len(last):
        return order
    held = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    held[last] = True
    return torch.cat([order[~held[order]], order[held[order]]])

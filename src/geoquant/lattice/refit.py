"""Least-squares steps: given the codes of a row, the steps of its groups that minimise the error in the metric.

With `q = sum_g s_g z_g`, z_g the codes of group g and zeros elsewhere, the error `(w - q)^T A (w - q)` of a row is a
quadratic form in its steps; its minimum solves one small system per row,

    M s = b,    M_gh = z_g^T A z_h,    b_g = z_g^T A w

The search of a step while Babai runs knows one group and diag(A) only; this knows all codes and all of A.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["refitted", "row_errors"]

RIDGE = 1e-9  # of the diagonal: groups whose codes are all alike in the metric keep their steps apart


def refitted(
    weight: Float[Tensor, "out in"],
    codes: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    scales: Float[Tensor, "out groups"],
    group_size: int,
) -> Float[Tensor, "out groups"]:
    """The minimiser, in the precision of `weight`; a group whose codes are all zero keeps its step of `scales`.

    codes: less their zero points. metric: A, as damped as it was solved. Memory grows with out * groups^2.
    """
    groups, columns = scales.shape[1], codes.shape[1]
    parts = [slice(g * group_size, min((g + 1) * group_size, columns)) for g in range(groups)]
    system = torch.zeros(len(codes), groups, groups, dtype=torch.float64, device=codes.device)
    target = torch.zeros(len(codes), groups, dtype=torch.float64, device=codes.device)
    aimed = weight @ metric
    for g, part in enumerate(parts):
        image = codes[:, part] @ metric[part]
        target[:, g] = (codes[:, part] * aimed[:, part]).sum(1)
        for h, other in enumerate(parts[: g + 1]):
            system[:, g, h] = system[:, h, g] = (image[:, other] * codes[:, other]).sum(1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = ~(diagonal > 0)
    # A group without codes: an equation of its own that says what its step was.
    target = torch.where(empty, scales.double(), target)
    diagonal.copy_(torch.where(empty, 1.0, diagonal * (1 + RIDGE)))
    # In units of the diagonal, whatever the metric's own are.
    size = diagonal.sqrt()
    found = torch.linalg.solve(system / size[:, :, None] / size[:, None], target / size) / size
    found = torch.where(found.isfinite() & (found != 0), found, scales.double())
    return found.to(weight.dtype).contiguous()


def row_errors(difference: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """`d^T A d` of every row."""
    return ((difference @ metric) * difference).sum(1)

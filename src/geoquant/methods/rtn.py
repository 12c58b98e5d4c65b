"""Round to nearest: every weight alone, steps searched by diag(A)-weighted squared error."""

from __future__ import annotations

import torch

from geoquant.lattice.grid import round_to_grid, search_scales
from geoquant.methods.problem import Problem, Solution, empty_kept

__all__ = ["solve"]


def solve(problem: Problem) -> Solution:
    """Nearest codes with searched steps; no compensation, no order, no damping.

    Alone, column j costs `A_jj eps_j^2`: its length in the lattice is `sqrt(A_jj)`.
    """
    grid, weight = problem.grid, problem.weight
    rows, columns = weight.shape
    transposed = weight.T.contiguous()
    # A damaged metric (NaN) must not spoil what needs no metric: this is also the fallback of the other methods.
    importance = problem.pooled.diagonal().nan_to_num(0.0, 0.0, 0.0)
    codes = torch.empty(columns, rows, device=weight.device)
    scales = torch.empty(grid.groups(columns), rows, device=weight.device)
    zeros = None if grid.symmetric else torch.empty_like(scales)
    clipped = torch.zeros(rows, device=weight.device)
    for group in range(grid.groups(columns)):
        part = slice(group * grid.group_size, min((group + 1) * grid.group_size, columns))
        scale, zero = search_scales(transposed[part], importance[part], grid)
        codes[part], unboxed = round_to_grid(transposed[part], scale, zero, grid)
        clipped += (codes[part] != unboxed).sum(0)
        scales[group] = scale
        if zeros is not None:
            zeros[group] = zero
    kept_index, kept_weight = empty_kept(rows)
    return Solution(
        codes=codes.T.to(torch.int8 if grid.symmetric else torch.uint8).contiguous(),
        scales=scales.T.to(torch.bfloat16).contiguous(),
        zero_points=None if zeros is None else zeros.T.to(torch.uint8).contiguous(),
        kept_index=kept_index,
        kept_weight=kept_weight,
        damping=0.0,
        gram_schmidt=importance.clamp_min(0).sqrt(),
        saturated=clipped / columns,
        grid=grid,
    )

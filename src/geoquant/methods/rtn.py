"""Round to nearest: every weight alone.

In the box steps are searched by the squared error weighted with diag(A); on the lattice they follow from the diagonals
of both sides of the metric. The baseline of both grids: what the rest of the metric is worth.
"""

from __future__ import annotations

import torch

from geoquant.lattice.basis import NotPositiveDefinite
from geoquant.lattice.grid import round_to_grid, search_scales
from geoquant.lattice.unboxed import narrow, steps_of
from geoquant.methods.babai import DEFAULT_DAMPING
from geoquant.methods.lattice import chosen_steps
from geoquant.methods.problem import LatticeSolution, Problem, Solution, empty_kept

__all__ = ["solve", "solve_lattice"]


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


def solve_lattice(problem: Problem) -> LatticeSolution:
    """Nearest codes with the steps `D / sqrt(G_ii A_jj)`: at which every weight, alone, costs the same expected loss.

    The damping keeps the steps of columns that hardly occur within reason. Rows are alone too. Raises
    NotPositiveDefinite for a metric without a sound diagonal.
    """
    count, known = max(1, problem.tokens), problem.rows
    squares = problem.pooled.diagonal() / count
    damping = DEFAULT_DAMPING if problem.damping is None else problem.damping
    lengths = (squares + damping * squares.mean()).sqrt()
    if not (lengths > 0).all():
        raise NotPositiveDefinite("the diagonal of the metric is not positive")
    rows, columns = chosen_steps(problem, lengths, known)
    row_steps = steps_of(rows)
    codes = torch.round(problem.weight / (row_steps[:, None] * steps_of(columns))).to(torch.int32)
    errors = row_steps.double().square().expand(2, -1).clone()
    return LatticeSolution(narrow(codes), rows, columns, problem.step, damping, lengths * count**0.5, errors)

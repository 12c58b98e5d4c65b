"""Babai with several survivors (K-best): in the box at Babai's steps, or on the lattice with rows alone.

How: lattice/kbest. A row keeps Babai's codes where those of the survivors are no better. An experiment; what it is
worth stands in docs/results.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.kbest import kbest
from geoquant.lattice.order import column_order
from geoquant.lattice.refit import row_errors
from geoquant.methods import babai, lattice
from geoquant.methods.problem import LatticeSolution, Problem, Solution

__all__ = ["better", "improved", "search", "solve", "solve_lattice"]

SURVIVORS = 8


def solve(problem: Problem) -> Solution:
    """In the box. Raises NotPositiveDefinite when the metric has no factor."""
    return improved(problem, babai.solve(problem))


def improved(problem: Problem, solution: Solution, survivors: int = SURVIVORS) -> Solution:
    """The same steps with better codes. `saturated` stays that of the solution given."""
    grid, weight, metric = solution.grid, problem.weight, problem.pooled
    order = column_order(problem.order, metric, grid.group_size)
    factor = compensation_factor(metric, order, solution.damping)

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(grid.group_size, 1)[:, : weight.shape[1]]

    steps = spread(solution.scales.float())
    zeros = torch.zeros_like(solution.codes, dtype=torch.int32)
    if solution.zero_points is not None:
        zeros = spread(solution.zero_points.int())
    codes = kbest(weight, factor, order, steps, survivors, (grid.lowest - zeros, grid.highest - zeros))
    codes = better(weight, damped(metric, solution.damping), steps, codes, solution.codes.int() - zeros)
    return replace(solution, codes=(codes + zeros).to(solution.codes.dtype))


def solve_lattice(problem: Problem) -> LatticeSolution:
    """Outside the box. Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, search)


def search(posed: lattice.Posed, survivors: int = SURVIVORS) -> Int[Tensor, "out in"]:
    """Rows alone. Raises ValueError where rows move each other: their survivors would multiply."""
    if posed.rows is not None and not posed.rows.strangers:
        raise ValueError("survivors are kept row by row, but the rows of this metric move each other")
    steps = posed.row_steps[:, None] * posed.column_steps
    codes = kbest(posed.weight, posed.factor, posed.order, steps, survivors)
    return better(posed.weight, damped(posed.metric, posed.damping), steps, codes, lattice.babai(posed))


def better(weight: Tensor, metric: Tensor, steps: Tensor, codes: Tensor, others: Tensor) -> Int[Tensor, "out in"]:
    """Of two solutions the better one of every row; the second where they are equal."""
    first, second = (row_errors(weight - steps * found, metric) for found in (codes, others))
    return torch.where((first < second)[:, None], codes, others.to(codes.dtype))

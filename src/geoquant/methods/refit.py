"""Babai, then the least-squares steps of its codes, codes once more at these steps, and their steps.

How: lattice/refit. Steps are rounded to bfloat16, in which they are stored; a row keeps what it had where the result
is no better. Only for the box: steps of the lattice are powers of 2^(1/8), coarser than what a refit would ask for. An
experiment; what it is worth stands in docs/results.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.grid import SCALE_DTYPE
from geoquant.lattice.order import column_order
from geoquant.lattice.refit import refitted, row_errors
from geoquant.methods import babai
from geoquant.methods.problem import Problem, Solution

__all__ = ["improved", "refit", "solve"]


def solve(problem: Problem) -> Solution:
    """Raises NotPositiveDefinite when the metric has no factor."""
    return improved(problem, babai.solve(problem))


def improved(problem: Problem, solution: Solution) -> Solution:
    """Steps, codes, steps."""
    return refit(problem, rounded_again(problem, refit(problem, solution)))


def refit(problem: Problem, solution: Solution) -> Solution:
    """The same codes with least-squares steps."""
    codes = solution.codes.float()
    if solution.zero_points is not None:
        codes = codes - solution.zero_points.float().repeat_interleave(solution.grid.group_size, 1)[:, : codes.shape[1]]
    metric = damped(problem.pooled, solution.damping)
    found = refitted(problem.weight, codes, metric, solution.scales.float(), solution.grid.group_size)
    tiny = torch.finfo(SCALE_DTYPE).tiny
    found = torch.where(found.abs() < tiny, tiny, found).to(SCALE_DTYPE)
    return chosen(problem, replace(solution, scales=found), solution)


def rounded_again(problem: Problem, solution: Solution) -> Solution:
    """Babai at the steps of a solution."""
    grid = solution.grid
    order = column_order(problem.order, problem.pooled, grid.group_size)
    factor = compensation_factor(problem.pooled, order, solution.damping)
    scales = solution.scales.T.float().contiguous()
    zeros = None if solution.zero_points is None else solution.zero_points.T.float().contiguous()
    importance = problem.pooled.diagonal()
    found = boxed_babai(problem.weight, factor, order, grid, importance, scales=scales, zeros=zeros)
    saturated = found.clipped / len(order)
    return chosen(problem, replace(solution, codes=found.codes.T.contiguous(), saturated=saturated), solution)


def chosen(problem: Problem, first: Solution, second: Solution) -> Solution:
    """Of two solutions on one grid the better one of every row; the second where they are equal."""
    metric = damped(problem.pooled, second.damping)
    errors = [row_errors(found.dequantize() - problem.weight, metric) for found in (first, second)]
    wins = errors[0] < errors[1]

    def mixed(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (one.dim() - 1)), one, other)

    names = ("codes", "scales", "saturated")
    return replace(second, **{name: mixed(getattr(first, name), getattr(second, name)) for name in names})

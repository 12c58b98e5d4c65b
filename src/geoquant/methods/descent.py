"""Babai, then cycles of single-code changes that lower the error further: coordinate descent, in the box or outside.

How: lattice/descent. In the box at Babai's steps; on the lattice in the metric of inputs and outputs, from Babai's
codes or, where bits have a price (lattice/priced), from those of `lattice-priced`: a change must pay for its bits. An
experiment; what it is worth stands in docs/results.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.lattice.basis import damped
from geoquant.lattice.descent import descend
from geoquant.lattice.prices import prices_of
from geoquant.methods import babai, lattice, priced
from geoquant.methods.problem import LatticeSolution, Problem, Solution

__all__ = ["improved", "search", "solve", "solve_lattice", "solve_priced"]

CYCLES = 3


def solve(problem: Problem) -> Solution:
    """In the box. Raises NotPositiveDefinite when the metric has no factor."""
    return improved(problem, babai.solve(problem))


def improved(problem: Problem, solution: Solution, cycles: int = CYCLES) -> Solution:
    """The same steps with better codes. `saturated` stays that of the solution given."""
    grid, codes = solution.grid, solution.codes.int()
    scales = solution.scales.float()
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    if solution.zero_points is not None:
        zeros = solution.zero_points.int()
    spread = zeros.repeat_interleave(grid.group_size, 1)[:, : codes.shape[1]]
    found, _ = descend(
        problem.weight,
        codes - spread,
        damped(problem.pooled, solution.damping),
        scales,
        problem.weight.new_ones(codes.shape[1]),
        limits=(grid.lowest - zeros, grid.highest - zeros),
        group_size=grid.group_size,
        cycles=cycles,
    )
    return replace(solution, codes=(found + spread).to(solution.codes.dtype))


def solve_lattice(problem: Problem) -> LatticeSolution:
    """Outside the box. Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, search)


def solve_priced(problem: Problem) -> LatticeSolution:
    """Outside the box, where bits have a price. Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, partial(search, mu=priced.PRICE))


def search(posed: lattice.Posed, mu: float = 0.0, cycles: int = CYCLES) -> Int[Tensor, "out in"]:
    """From Babai's codes, or with a price `mu` of a bit (in squared steps) from those of methods/priced."""
    codes = priced.search(posed, mu) if mu else lattice.babai(posed)
    curvature = sizes = None
    if posed.rows is not None:
        inverse = torch.linalg.inv(posed.rows.factor.double())
        curvature, sizes = inverse @ inverse.mT, posed.rows.sizes  # G^-1 = U^T U
    return descend(
        posed.weight,
        codes,
        damped(posed.metric, posed.damping),
        posed.row_steps[:, None],
        posed.column_steps,
        curvature=curvature,
        sizes=sizes,
        prices=prices_of(codes) if mu else None,
        mu=mu * posed.step**2 / posed.price,
        cycles=cycles,
    )[0]

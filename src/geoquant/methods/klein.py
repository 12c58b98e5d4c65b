"""The unboxed lattice by Klein's randomised rounding, several times, each row keeping its best codes.

How: lattice/klein. Babai's own codes take part, so that no row is worse. Rows are solved alone. An experiment; what it
is worth stands in docs/results.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.lattice.basis import damped
from geoquant.lattice.klein import klein
from geoquant.methods import lattice
from geoquant.methods.kbest import better
from geoquant.methods.problem import LatticeSolution, Problem

__all__ = ["search", "solve"]

RUNS = 8
SIGMA = 0.15  # of a step: leaves the nearest code only near ties


def solve(problem: Problem) -> LatticeSolution:
    """Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, search)


def search(posed: lattice.Posed, runs: int = RUNS, sigma: float = SIGMA, seed: int = 0) -> Int[Tensor, "out in"]:
    """Rows alone. Raises ValueError where rows move each other: none could keep codes of its own."""
    if posed.rows is not None and not posed.rows.strangers:
        raise ValueError("every row keeps its best run, but the rows of this metric move each other")
    generator = torch.Generator(posed.weight.device).manual_seed(seed)
    metric, steps = damped(posed.metric, posed.damping), posed.row_steps[:, None] * posed.column_steps
    codes = lattice.babai(posed)
    width = sigma * posed.price**-0.5  # a column's length times its step, but for rounding and ties
    given = (posed.weight, posed.factor, posed.order, posed.row_steps, posed.column_steps)
    for _ in range(runs):
        codes = better(posed.weight, metric, steps, klein(*given, width, generator), codes)
    return codes

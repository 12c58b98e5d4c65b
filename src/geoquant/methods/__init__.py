"""Quantization methods, one file each: a function from a `Problem` to a `Solution`."""

from __future__ import annotations

from geoquant.methods import babai, dqc, lattice, rtn
from geoquant.methods.problem import LatticeSolution, Problem, Solution

__all__ = ["METHODS", "NEAREST", "LatticeSolution", "Problem", "Solution"]

METHODS = {"rtn": rtn.solve, "babai": babai.solve, "dqc": dqc.solve, "lattice": lattice.solve}

# What a method falls back to where the metric has no factor; rounding in the box where it names nothing else.
NEAREST = {"lattice": lattice.nearest}

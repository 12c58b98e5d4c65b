"""Quantization methods, one file each: a function from a `Problem` to a `Solution`."""

from __future__ import annotations

from geoquant.methods import babai, dqc, rtn
from geoquant.methods.problem import Problem, Solution

__all__ = ["METHODS", "Problem", "Solution"]

METHODS = {"rtn": rtn.solve, "babai": babai.solve, "dqc": dqc.solve}

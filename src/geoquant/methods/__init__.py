"""Quantization methods, one file each: a function from a `Problem` to a `Solution`.

Of the box: `BOX`. Of the unbounded lattice: `LATTICE`. What is neither a default nor its fallback is an experiment with
a verdict in docs/results.md.
"""

from __future__ import annotations

from geoquant.methods import babai, descent, dqc, kbest, klein, lattice, priced, refit, rtn
from geoquant.methods.problem import LatticeSolution, Problem, Solution

__all__ = ["BOX", "LATTICE", "METHODS", "NEAREST", "ROWS_ALONE", "LatticeSolution", "Problem", "Solution"]

BOX = {
    "rtn": rtn.solve,
    "babai": babai.solve,
    "dqc": dqc.solve,
    "kbest": kbest.solve,
    "descent": descent.solve,
    "refit": refit.solve,
}
LATTICE = {
    "lattice": lattice.solve,
    "lattice-priced": priced.solve,
    "lattice-descent": descent.solve_lattice,
    "lattice-priced-descent": descent.solve_priced,
    "lattice-kbest": kbest.solve_lattice,
    "lattice-klein": klein.solve,
    "lattice-rtn": rtn.solve_lattice,
}
METHODS = BOX | LATTICE
# Solve every row by itself: with `--row-block 1` only.
ROWS_ALONE = frozenset({"lattice-kbest", "lattice-klein", "lattice-rtn"})

# What a method falls back to where the metric has no factor; rounding in the box where it names nothing else.
NEAREST = dict.fromkeys(LATTICE, lattice.nearest)

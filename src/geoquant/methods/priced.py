"""The unboxed lattice with a price on bits: near-ties go to the code that is cheaper to store.

How and why: lattice/priced. The prices come from Babai's own codes; a second round, with those of the priced
codes, gains next to nothing. The default; what it is worth stands in docs/results.md.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from geoquant.lattice.priced import priced_babai, prices_of
from geoquant.methods import lattice
from geoquant.methods.problem import LatticeSolution, Problem

__all__ = ["search", "solve"]

PRICE = 0.09  # of a bit, in squared steps: three quarters of a fine lattice's, best of five on twelve stages


def solve(problem: Problem) -> LatticeSolution:
    """Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, search, reach=1.5)  # the nearest code, or the next one towards zero


def search(posed: lattice.Posed, mu: float = PRICE, rounds: int = 1) -> Int[Tensor, "out in"]:
    """Codes at the price `mu` of a bit, in squared steps."""
    codes = lattice.babai(posed)
    given = (posed.weight, posed.basis, posed.order, posed.row_steps, posed.column_steps, posed.rows)
    for _ in range(rounds):
        codes = priced_babai(*given, prices_of(codes), *costs(posed), mu)
    return codes


def costs(posed: lattice.Posed) -> tuple[Tensor, Tensor]:
    """What a squared step of row i and column j costs in units of `D^2`, as the product of two numbers."""
    lengths = posed.basis.new_empty(len(posed.order))
    lengths[posed.order] = posed.basis.diagonal()
    row_lengths = 1.0 if posed.rows is None else posed.rows.lengths
    rows = (posed.row_steps * row_lengths / posed.step).square() * posed.price
    return rows, (posed.column_steps * lengths).square()

"""The unboxed lattice with a price on bits: centres are drawn towards the codes that are cheaper to store.

How and why: lattice/priced. The default; what it is worth stands in docs/results.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.lattice.basis import error_spread
from geoquant.lattice.beside import Pulls
from geoquant.lattice.priced import pulls_of, variances
from geoquant.lattice.unboxed import unboxed_babai
from geoquant.methods import lattice
from geoquant.methods.problem import LatticeSolution, Problem

__all__ = ["pulls", "search", "solve"]

PRICE = 0.1  # of a bit, in squared steps: about what does best on twelve stages at 2.5 and at 2.1 bits


def solve(problem: Problem) -> LatticeSolution:
    """Raises NotPositiveDefinite when the metric has no factor."""
    return lattice.solve_by(problem, search, reach=1.5)


def search(posed: lattice.Posed, mu: float = PRICE) -> Int[Tensor, "out in"]:
    """Codes at the price `mu` of a bit, in squared steps."""
    given = (posed.weight, posed.basis, posed.order, posed.row_steps, posed.column_steps, posed.rows)
    return unboxed_babai(*given, pulls(posed, mu))


def pulls(posed: lattice.Posed, mu: float) -> Pulls:
    """How far the centres of every row and column are drawn at the price `mu` of a bit."""
    lengths = torch.empty_like(posed.basis.diagonal()).index_copy_(0, posed.order, posed.basis.diagonal())
    sides = lengths * posed.column_steps  # alike, but for rounding and where columns share a step
    row_steps = posed.row_steps.double()  # squares of a row of huge weights
    row_lengths, row_errors = torch.ones_like(row_steps), torch.ones_like(row_steps)
    if posed.rows is not None:
        row_lengths = posed.rows.lengths
        row_errors = posed.rows.error_squares(row_steps)[0] / row_steps.square()
    spread = variances(
        posed.weight,
        posed.row_steps,
        posed.column_steps,
        row_errors,
        error_spread(posed.basis, posed.order, sides) / posed.column_steps.square(),
    )
    # What a squared step of row i and column j costs in units of D^2.
    cost = (row_steps * row_lengths / posed.step).square() * posed.price, sides.square()
    return pulls_of(spread, cost, mu)

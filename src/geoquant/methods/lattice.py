"""The unboxed lattice: rank-one steps from the metric, Babai without clipping, codes for an entropy coder.

With the metric `G (x) A` of a stage (A from its inputs, G its output curvature in blocks of rows) and one global step
D, row i gets the step `D / r_i` and column j the step `1 / r_j`, r the Gram-Schmidt lengths of G and of A. Every code
of the whole model then costs the same expected loss, `D^2/24` nats: reverse water-filling. How many bits a site takes
falls out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.basis import (
    NotPositiveDefinite,
    heldout_prices,
    metric_factor,
    permuted,
    sample_stride,
    triangular_inverse,
)
from geoquant.lattice.order import column_order
from geoquant.lattice.rows import RowMetric
from geoquant.lattice.unboxed import ROWS, exponents, narrow, steps_of, unboxed_babai
from geoquant.methods.babai import DEFAULT_DAMPING, least
from geoquant.methods.problem import LatticeSolution, Problem

__all__ = ["Posed", "babai", "choose_damping", "chosen_steps", "nearest", "solve", "solve_by"]

SHORTEST = 2.0**-30  # of a row's largest weight: its code is then 2^30, and errors of others find room in an int32


@dataclass(frozen=True)
class Posed:
    """A problem with everything decided but its codes.

    weight: (out, in). metric: (in, in) mean of `w_t x_t x_t^T`, without the damping. basis: `V` of its `metric_factor`
    in `order`. Steps in the original order. rows: the output side, in the type of the basis.
    price: what a unit of squared length costs on held-out tokens. step: the global D.
    """

    weight: Float[Tensor, "out in"]
    metric: Float[Tensor, "in in"]
    damping: float
    basis: Float[Tensor, "in in"]
    order: Int[Tensor, " in"]
    row_steps: Float[Tensor, " out"]
    column_steps: Float[Tensor, " in"]
    rows: RowMetric | None
    price: float
    step: float

    @property
    def factor(self) -> Float[Tensor, "in in"]:
        """`U = V^-1`, for searches that move weights."""
        return triangular_inverse(self.basis.T).T.contiguous()


def babai(posed: Posed) -> Int[Tensor, "out in"]:
    """Plane by plane, to the nearest code."""
    return unboxed_babai(posed.weight, posed.basis, posed.order, posed.row_steps, posed.column_steps, posed.rows)


def solve(problem: Problem) -> LatticeSolution:
    """Babai at the problem's step. Raises NotPositiveDefinite when the metric has no factor."""
    return solve_by(problem, babai)


def solve_by(problem: Problem, search: Callable[[Posed], Int[Tensor, "out in"]], reach: float = 0.5) -> LatticeSolution:
    """Order, damping and steps as always, codes by `search`, none of which is further than `reach` steps from what it
    was chosen for. Raises NotPositiveDefinite."""
    count = max(1, problem.tokens)
    metric = problem.pooled / count
    order = column_order(problem.order, metric, metric.shape[0])
    damping, price = choose_damping(problem, order)
    basis = metric_factor(metric, order, damping)
    lengths = torch.empty_like(basis.diagonal())
    lengths[order] = basis.diagonal()
    weight, known = problem.weight, problem.rows
    if known is not None:
        known = replace(known, factor=known.factor.to(basis))
    rows, columns = chosen_steps(problem, lengths * price**0.5, known)
    row_steps = steps_of(rows)
    codes = search(
        Posed(weight, metric, damping, basis, order, row_steps, steps_of(columns), known, price, problem.step)
    )
    if outside(codes):
        raise NotPositiveDefinite("a row is so much larger than those it shares a block with that codes leave 32 bits")
    exact = row_steps.double()  # huge rows have squares beyond single precision
    expected, worst = (exact.square(),) * 2 if known is None else known.error_squares(exact)
    spread = torch.stack([expected, worst * (2 * reach) ** 2])
    return LatticeSolution(narrow(codes), rows, columns, problem.step, damping, lengths * count**0.5, spread)


def chosen_steps(
    problem: Problem, lengths: Float[Tensor, " in"], known: RowMetric | None
) -> tuple[Int[Tensor, " out"], Int[Tensor, " in"]]:
    """Exponents of the steps of rows and of columns, where a unit of column j costs `lengths[j]` and of row i what
    `known` says: the reciprocals, tied where they must be, within what a row's largest weight makes use of."""
    columns = exponents(tied(lengths, problem.ties).reciprocal())
    row_lengths = lengths.new_ones(len(problem.weight)) if known is None else known.lengths
    largest = largest_weights(problem.weight, steps_of(columns))
    wanted = (problem.step / row_lengths).clamp_min(SHORTEST * largest)
    return exponents(torch.minimum(wanted, longest(largest))), columns


def outside(codes: Int[Tensor, "out in"]) -> bool:
    """Whether a code met the end of its type, where a larger one would have been cut off."""
    if codes.dtype != torch.int32 or not codes.numel():
        return False
    limits = torch.iinfo(torch.int32)
    least, most = codes.aminmax()
    return bool(least == limits.min or most == limits.max)


def tied(lengths: Tensor, ties: Tensor | None) -> Tensor:
    """What stands for the length of columns that must share their step: the root mean square, which leaves each group
    with the error that its columns would have alone, so that all the price is in bits."""
    if ties is None:
        return lengths
    ties = ties.to(lengths.device)
    count = int(ties.max()) + 1
    squares, sizes = (lengths.new_zeros(count).index_add_(0, ties, x) for x in (lengths**2, torch.ones_like(lengths)))
    return (squares / sizes.clamp_min(1)).sqrt()[ties]


def largest_weights(weight: Tensor, column_steps: Tensor) -> Tensor:
    """Of each row, in units of the steps of its columns."""
    parts = weight.split(ROWS)  # of an embedding a few thousand rows at a time
    return torch.cat([(part.abs() / column_steps).amax(1) for part in parts])


def longest(largest: Tensor) -> Tensor:
    """The longest step a row has any use for: twice its largest weight; of a row of zeros, that of the others."""
    largest = 2 * largest
    most = largest.max()
    return torch.where(largest > 1e-6 * most, largest, torch.where(most > 0, most, 1.0))


def nearest(problem: Problem) -> LatticeSolution:
    """Where the metric has no factor: every weight alone, in steps of a sixteenth of its row's root mean square."""
    size = torch.linalg.vector_norm(problem.weight, dim=1, dtype=torch.float64) / problem.weight.shape[1] ** 0.5
    # Rows of nothing take the step of most others; those of one far too large row would leave nothing of the rest.
    usual = size[size > 0].median() if size.any() else size.new_ones(())
    rows = exponents(torch.where(size > 1e-6 * usual, size, usual) / 16)
    columns = torch.zeros(problem.weight.shape[1], dtype=torch.int16, device=rows.device)
    codes = torch.round(problem.weight / steps_of(rows)[:, None]).to(torch.int32)
    lengths = problem.pooled.diagonal().nan_to_num(0.0, 0.0, 0.0).clamp_min(0).sqrt()
    squares = steps_of(rows).double().square().expand(2, -1)
    return LatticeSolution(narrow(codes), rows, columns, problem.step, 0.0, lengths, squares)


def choose_damping(problem: Problem, order: Tensor) -> tuple[float, float]:
    """The lambda of DAMPINGS with the least expected held-out error *at equal rate*, and what a unit of squared length
    costs there: below one where damping makes the lengths longer than they are, above where they were over-fitted.

    Steps follow the lengths, `s_j = D / r_j`, and at equal rate D follows their geometric mean. A damping that is
    given is not changed.
    """
    if problem.heldout is None:
        return DEFAULT_DAMPING if problem.damping is None else problem.damping, 1.0
    reverse = order.flip(0)
    metric, heldout = permuted(problem.hessian, reverse), permuted(problem.heldout, reverse)
    # Held-out tokens may weigh more or less than the others; only the shape of their metric is news.
    scale = (metric.diagonal().sum() / heldout.diagonal().sum().clamp_min(1e-30)).item()
    stride = sample_stride(len(metric))

    @cache
    def prices(damping: float) -> tuple[float, float]:
        prices, lengths = heldout_prices(metric, heldout, damping, stride=stride)
        return scale * (prices / lengths[::stride].square()).mean().item(), 2 * lengths.log().mean().item()

    damping = problem.damping
    if damping is None:
        damping = least(lambda damping: prices(damping)[0] * math.exp(prices(damping)[1]))
    price = prices(damping)[0]
    return damping, price if 0 < price < math.inf else 1.0  # no held-out signal

"""The experiments against independent truths: enumeration, exact minimisers, and what no step may make worse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.descent import descend
from geoquant.lattice.grid import Grid
from geoquant.lattice.kbest import kbest
from geoquant.lattice.order import column_order
from geoquant.lattice.prices import prices_of
from geoquant.lattice.refit import refitted
from geoquant.lattice.rows import block_sizes, row_metric, single_rows
from geoquant.lattice.unboxed import unboxed_babai
from geoquant.methods import LATTICE, Problem, babai, descent, klein, lattice, priced, refit
from geoquant.methods import kbest as kbest_method
from oracles.lattice import closest_vectors, column_error, random_metric


def basis_of(factor):
    """V of a compensation factor."""
    return torch.linalg.inv(factor).triu()


def posed(columns, rows, seed, *, coarse=1.0):
    """A damped metric, order, factor, and weights a few steps `coarse / r_j` from zero; all in double precision."""
    metric = damped(random_metric(columns, seed), 0.01)
    order = column_order("activation", metric, columns)
    factor = compensation_factor(metric, order, 0.0)
    steps = torch.empty(columns, dtype=torch.float64)
    steps[order] = coarse * factor.diagonal()
    generator = torch.Generator().manual_seed(seed)
    weight = 1.5 * steps / coarse * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return metric, order, factor, steps, weight


def coupled(rows, seed):
    """An output metric whose rows move each other: factors, and G as one matrix."""
    sizes = block_sizes([rows], 4)
    blocks = torch.zeros(len(sizes), 4, 4, dtype=torch.float64)
    for block, count in enumerate(sizes):
        blocks[block, :count, :count] = random_metric(count, seed + block, decades=0.5)
    found = row_metric(blocks.float(), sizes, floor=0.0, keep=1.0)
    return found, torch.block_diag(*(part[:count, :count] for part, count in zip(blocks, sizes)))


# --- K-best


@settings(max_examples=10, deadline=None)
@given(columns=st.integers(1, 5), seed=st.integers(0, 999))
def test_enough_survivors_find_the_closest_vector_of_a_box_of_two_nearest_codes(columns, seed):
    """Where every prefix survives, K-best is exact over the two nearest codes: with codes 0 and 1 that is all."""
    metric, order, factor, steps, weight = posed(columns, 4, seed)
    one = torch.ones(4, columns, dtype=torch.float64)
    limits = (torch.zeros_like(one), torch.ones_like(one))
    codes = kbest(weight, factor, order, one * steps, 2**columns, limits)
    points = torch.tensor(list(itertools.product((0.0, 1.0), repeat=columns)), dtype=torch.float64) * steps
    best = torch.stack([column_error(points - row, metric).min() for row in weight])
    torch.testing.assert_close(column_error(weight - codes * steps, metric), best)


def least_of_two_nearest(row, metric, order, steps):
    """Least error over all paths that take the nearest or the second nearest code in every column, one by one."""
    back = order.flip(0)
    basis = torch.linalg.cholesky(metric[back][:, back]).T * steps[back]
    target, errors = (basis / steps[back]) @ row[back], []
    for picks in itertools.product((0, 1), repeat=len(row)):
        codes = torch.zeros_like(row)
        for j in range(len(row) - 1, -1, -1):
            centre = (target[j] - basis[j, j + 1 :] @ codes[j + 1 :]) / basis[j, j]
            codes[j] = centre.round() + picks[j] * (1.0 if centre >= centre.round() else -1.0)
        errors.append((target - basis @ codes).square().sum())
    return torch.stack(errors).min()


@settings(max_examples=10, deadline=None)
@given(columns=st.integers(2, 4), survivors=st.sampled_from([2, 4, 16]), seed=st.integers(0, 999))
def test_kbest_lies_between_the_closest_vector_and_its_own_tree(columns, survivors, seed):
    metric, order, factor, steps, weight = posed(columns, 3, seed)
    codes = kbest(weight, factor, order, steps.expand(3, columns), survivors)
    one = torch.ones(3, dtype=torch.float64)
    best = closest_vectors(weight / steps, metric * steps * steps[:, None], one, Grid(4))
    error = column_error(weight - codes * steps, metric)
    tree = torch.stack([least_of_two_nearest(row, metric, order, steps) for row in weight])
    assert (error >= best - 1e-9).all()
    assert (error >= tree - 1e-9).all()
    if survivors >= 2**columns:
        torch.testing.assert_close(error, tree)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_one_survivor_is_babai(columns):
    metric, order, factor, steps, weight = posed(columns, 5, 3)
    rows = torch.ones(5, dtype=torch.float64)
    codes = kbest(weight, factor, order, steps.expand(5, columns), 1)
    assert torch.equal(codes, unboxed_babai(weight, basis_of(factor), order, rows, steps).to(codes.dtype))
    scales = (2 * steps)[:, None].expand(columns, 5).contiguous()
    grid = Grid(2, 1)
    boxed = boxed_babai(weight, factor, order, grid, metric.diagonal(), scales=scales)
    limits = tuple(torch.full((5, columns), code) for code in (grid.lowest, grid.highest))
    assert torch.equal(kbest(weight, factor, order, scales.T, 1, limits).to(torch.int8), boxed.codes.T)
    assert columns == 1 or boxed.clipped.sum() > 0


def test_more_survivors_find_more():
    metric, order, factor, steps, weight = posed(60, 200, 1)
    errors = [
        column_error(weight - kbest(weight, factor, order, steps.expand(200, 60), count) * steps, metric).mean().item()
        for count in (1, 4, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_survivors_are_counted_from_one():
    with pytest.raises(ValueError, match="survivors must be at least 1, got 0"):
        kbest(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]), torch.ones(1, 1), 0)


# --- coordinate descent


def form(weight, values, metric, curvature=None):
    """`tr(G E A E^T)`."""
    error = weight - values
    inner = error @ metric @ error.T
    return (inner.diagonal() if curvature is None else inner * curvature).sum().item()


@settings(max_examples=10, deadline=None)
@given(
    columns=st.sampled_from([1, 5, 64, 70]), rows=st.sampled_from([1, 6]), box=st.booleans(), seed=st.integers(0, 99)
)
def test_cycles_lower_the_form_and_end_where_no_single_change_does(columns, rows, box, seed):
    metric, order, factor, steps, weight = posed(columns, rows, seed)
    one = torch.ones(rows, dtype=torch.float64)
    codes = unboxed_babai(weight, basis_of(factor), order, one, steps)
    limits = (torch.full((rows, 1), -2), torch.full((rows, 1), 1)) if box else None
    codes = codes.clamp(-2, 1) if box else codes
    last = form(weight, codes * steps, metric)
    for _ in range(50):
        codes, changes = descend(weight, codes, metric, one[:, None], steps, limits=limits, cycles=1)
        now = form(weight, codes * steps, metric)
        assert now <= last * (1 + 1e-5)
        if not changes:
            break
        last = now
    assert changes == 0
    for j in range(columns):
        for move in (-1, 1):
            other = codes.clone()
            other[:, j] += move
            allowed = (other[:, j] >= -2) & (other[:, j] <= 1) if box else torch.ones(rows, dtype=torch.bool)
            worse = column_error(weight - other * steps, metric) - column_error(weight - codes * steps, metric)
            assert (worse[allowed] >= -1e-4 * metric[j, j] * steps[j] ** 2).all()


def test_rows_that_move_each_other_fall_in_their_common_form():
    """Against the dense form; what rows alone would do is another point."""
    metric, order, factor, steps, weight = posed(20, 10, 5)
    known, curvature = coupled(10, 5)
    row_steps = (0.9 / known.lengths).double()
    weight = weight * row_steps[:, None]
    known_double = type(known)(known.factor.double(), known.sizes)
    codes = unboxed_babai(weight, basis_of(factor), order, row_steps, steps, known_double)
    inverse = torch.linalg.inv(known_double.factor)
    given = {"curvature": inverse @ inverse.mT, "sizes": known.sizes}
    found, changes = descend(weight, codes, metric, row_steps[:, None], steps, cycles=20, **given)
    alone, _ = descend(weight, codes, metric, row_steps[:, None], steps, cycles=20)
    values = [form(weight, row_steps[:, None] * z * steps, metric, curvature) for z in (codes, found, alone)]
    assert changes > 0
    assert values[1] < values[0]
    assert values[1] < values[2]
    for i, j in itertools.product(range(10), range(20)):
        for move in (-1, 1):
            other = found.clone()
            other[i, j] += move
            assert form(weight, row_steps[:, None] * other * steps, metric, curvature) > values[1] - 1e-3


def test_many_rows_are_descended_in_parts(monkeypatch):
    metric, _order, _factor, steps, weight = posed(12, 9, 2)
    one = torch.ones(9, 1, dtype=torch.float64)
    zero = torch.zeros(9, 12, dtype=torch.int32)
    limits = (torch.full((9, 1), -1), torch.arange(9)[:, None])
    whole = descend(weight, zero, metric, one, steps, limits=limits)
    monkeypatch.setattr("geoquant.lattice.descent.ROWS", 4)
    parts = descend(weight, zero, metric, one, steps, limits=limits)
    assert torch.equal(whole[0], parts[0])
    assert whole[1] == parts[1]


# --- least-squares steps


@settings(max_examples=10, deadline=None)
@given(columns=st.sampled_from([1, 4, 10, 33]), group_size=st.sampled_from([1, 4, 64]), seed=st.integers(0, 99))
def test_refitted_steps_are_those_of_least_squares(columns, group_size, seed):
    """Row by row against lstsq on the square root of the metric."""
    metric = damped(random_metric(columns, seed), 0.01)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    codes = torch.randint(-2, 3, (3, columns), generator=generator).double()
    groups = -(-columns // group_size)
    before = torch.full((3, groups), 0.25, dtype=torch.float64)
    found = refitted(weight, codes, metric, before, group_size)
    root = torch.linalg.cholesky(metric).T
    for row in range(3):
        design = torch.zeros(columns, groups, dtype=torch.float64)
        design[torch.arange(columns), torch.arange(columns) // group_size] = codes[row]
        used = design.any(0)
        wanted = before[row].clone()
        if used.any():
            wanted[used] = torch.linalg.lstsq(root @ design[:, used], (root @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-7)


# --- as methods


def problem(rows=12, columns=40, seed=0, **changes):
    torch.manual_seed(seed)
    weight, metric = 0.02 * torch.randn(rows, columns), random_metric(columns, seed).float()
    return Problem(weight, metric, random_metric(columns, seed + 1).float() / 7, **changes)


def total_error(given, solution):
    metric = damped(given.pooled, solution.damping).double()
    return column_error(solution.dequantize().double() - given.weight.double(), metric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("solve", [kbest_method.solve, descent.solve, refit.solve])
def test_in_the_box_no_row_is_worse_than_babai_s(solve, symmetric):
    given = problem(rows=40, columns=70, grid=Grid(3, 16, symmetric))
    plain, found = babai.solve(given), solve(given)
    before, after = total_error(given, plain), total_error(given, found)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.995 * before.sum()


def on_the_lattice(rows=16, columns=40, *, block=1, seed=0):
    given = problem(rows, columns, seed, order="activation", tokens=100, step=0.02)
    known, _ = coupled(rows, seed)
    known = known if block > 1 else single_rows(torch.rand(rows) + 0.5)
    return Problem(**{**vars(given), "rows": known})


@pytest.mark.parametrize("search", [kbest_method.search, klein.search, descent.search])
def test_on_the_lattice_no_row_alone_is_worse_than_babai_s(search):
    given = on_the_lattice()
    plain, found = lattice.solve(given), lattice.solve_by(given, search)
    assert torch.equal(found.row_exponents, plain.row_exponents)
    before, after = total_error(given, plain), total_error(given, found)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("search", [kbest_method.search, klein.search])
def test_rows_that_move_each_other_are_refused_where_rows_choose_alone(search):
    with pytest.raises(ValueError, match="rows of this metric move each other"):
        lattice.solve_by(on_the_lattice(block=4), search)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", ["lattice-priced", "lattice-descent", "lattice-priced-descent"])
def test_lattice_methods_solve_either_kind_of_rows(name, block):
    given = on_the_lattice(block=block)
    plain, found = lattice.solve(given), LATTICE[name](given)
    assert found.codes.shape == plain.codes.shape
    assert torch.equal(LATTICE[name](given).codes, found.codes)
    assert (found.codes != plain.codes).any()
    if "priced" in name:
        assert found.codes.abs().sum() < plain.codes.abs().sum()


def test_descent_with_a_price_lowers_error_plus_price():
    given = on_the_lattice(rows=24, block=4)
    scores = []
    for search in (priced.search, lambda posed: descent.search(posed, mu=priced.PRICE)):

        def scored(posed, search=search):
            codes = search(posed)
            prices = prices_of(priced.search(posed, priced.PRICE))
            inverse = torch.linalg.inv(posed.rows.factor)
            whole = torch.block_diag(*(p[:n, :n] for p, n in zip(inverse @ inverse.mT, posed.rows.sizes)))
            values = posed.row_steps[:, None] * codes * posed.column_steps
            loss = form(posed.weight, values, damped(posed.metric, posed.damping), whole)
            sizes = codes.abs().long().clamp_max(prices.bits.shape[1] - 1)
            paid = prices.bits[prices.spread.classes(), sizes].sum().item()
            scores.append(loss + priced.PRICE * posed.step**2 / posed.price * paid)
            return codes

        lattice.solve_by(given, scored)
    assert scores[1] < scores[0]

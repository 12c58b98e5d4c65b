"""Babai on the unbounded lattice against the textbook, brute force, and its own law of errors."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import NotPositiveDefinite, compensation_factor, damped, metric_factor
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import ORDERS, column_order
from geoquant.lattice.rows import block_sizes, row_metric
from geoquant.lattice.unboxed import exponents, steps_of, unboxed_babai
from geoquant.methods import METHODS
from geoquant.methods.lattice import choose_damping, nearest, solve, tied
from geoquant.methods.problem import Problem
from oracles.lattice import closest_vectors, column_error, random_metric, textbook_babai


def snapped(steps):
    """The nearest steps that can be stored."""
    return steps_of(exponents(steps))


def lengths_of(metric, order, damping=0.01):
    found = torch.empty(len(metric), dtype=metric.dtype)
    basis = metric_factor(metric, order, damping)
    found[order] = basis.diagonal()
    return basis, found


@settings(deadline=None)
@given(st.lists(st.integers(-900, 900), min_size=1, max_size=40))
def test_exponents_name_their_steps(index):
    index = torch.tensor(index, dtype=torch.int16)
    steps = steps_of(index)
    torch.testing.assert_close(exponents(steps), index)
    torch.testing.assert_close(steps.to(torch.bfloat16).float(), steps, rtol=0, atol=0)


def test_a_stored_step_is_near_the_wanted_one():
    wanted = torch.logspace(-12, 6, 5000, dtype=torch.float64)
    ratio = snapped(wanted).double() / wanted
    # Half of an eighth of an octave, and half a unit of bfloat16's eight bits.
    assert ratio.log2().abs().max() <= 1 / 16 + math.log2(1 + 2**-8)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.sampled_from([1, 2, 15, 64, 65, 150]),
    rows=st.sampled_from([1, 3]),
    name=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 99),
)
def test_codes_are_the_textbook_s(columns, rows, name, seed):
    """In double precision, on every order, with different steps for every row and column."""
    metric = random_metric(columns, seed)
    order = column_order(name, metric, 16)
    basis, _ = lengths_of(metric, order)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rows_, columns_ = (0.05 + torch.rand(size, generator=generator, dtype=torch.float64) for size in (rows, columns))
    found = unboxed_babai(weight, basis, order, rows_, columns_)
    wide = Grid(8)
    object.__setattr__(wide, "bits", 40)  # a box that nothing reaches
    steps = rows_[:, None] * columns_
    expected = textbook_babai(weight, damped(metric, 0.01), order, steps, wide)
    torch.testing.assert_close(found.double(), expected)


def test_without_clipping_the_box_gives_the_same_codes():
    metric, columns = random_metric(90, 3), 90
    order = column_order("activation", metric, columns)
    basis, lengths = lengths_of(metric, order)
    weight = torch.randn(5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = 0.2 / lengths * lengths.median()
    scales = steps[:, None].expand(columns, 5).contiguous()
    factor = compensation_factor(metric, order, 0.01)
    boxed = boxed_babai(weight, factor, order, Grid(8, 1), metric.diagonal(), scales=scales)
    assert boxed.clipped.sum() == 0
    found = unboxed_babai(weight, basis, order, torch.ones(5, dtype=torch.float64), steps)
    torch.testing.assert_close(found.T.to(torch.int8), boxed.codes)


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 4), seed=st.integers(0, 999))
def test_never_better_than_the_closest_vector_nor_worse_than_the_bound(columns, seed):
    metric = damped(random_metric(columns, seed), 0.01)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    basis, lengths = lengths_of(metric, order, 0.0)
    steps, one = lengths.reciprocal(), torch.ones(3, dtype=torch.float64)
    # Few steps from zero, so that a box of sixteen codes holds the closest vector.
    weight = steps * torch.randn(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    codes = unboxed_babai(weight, basis, order, one, steps)
    error = column_error(weight - codes * steps, metric)
    # The same lattice in units of its steps.
    best = closest_vectors(weight / steps, metric * steps * steps[:, None], one, Grid(4))
    assert (error >= best - 1e-9).all()
    # Steps 1/r_j: a quarter for every column.
    assert (error <= columns / 4 + 1e-9).all()


def test_the_expected_error_is_a_twelfth_of_every_square():
    """4000 random targets: within five per cent of the mean (three standard errors are about one)."""
    columns = 48
    metric = damped(random_metric(columns, 7), 0.01)
    order = column_order("activation", metric, columns)
    basis, lengths = lengths_of(metric, order, 0.0)
    generator = torch.Generator().manual_seed(1)
    weight = 50 * torch.randn(4000, columns, generator=generator, dtype=torch.float64) / lengths
    steps = lengths.reciprocal()
    codes = unboxed_babai(weight, basis, order, torch.ones(4000, dtype=torch.float64), steps)
    assert column_error(weight - codes * steps, metric).mean().item() == pytest.approx(columns / 12, rel=0.05)


def diagonal(curvature):
    """Rows that are strangers to each other."""
    return row_metric(curvature[:, None, None], (1,) * len(curvature), floor=0.0, keep=1.0)


def correlated(rows, size, seed=0, **options):
    """Curvature of stacked rows in blocks, its factors, and the whole metric as one matrix."""
    sizes = block_sizes(rows, size)
    blocks = torch.zeros(len(sizes), size, size, dtype=torch.float64)
    for block, count in enumerate(sizes):
        blocks[block, :count, :count] = random_metric(count, seed + block, decades=0.5)
    metric = row_metric(blocks.float(), sizes, **({"floor": 0.0, "keep": 1.0} | options))
    return blocks, metric, torch.block_diag(*(part[:count, :count] for part, count in zip(blocks, sizes)))


def test_blocks_do_not_straddle_sites():
    assert block_sizes([5, 3, 4], 4) == (4, 1, 3, 4)


def test_row_factors_are_those_of_every_block():
    _, rows, whole = correlated([5, 3], 4, seed=2)
    factors = torch.block_diag(*(part[:count, :count] for part, count in zip(rows.factor, rows.sizes))).double()
    torch.testing.assert_close(factors.T @ factors @ whole, torch.eye(8, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    lengths = torch.cat(
        [
            torch.linalg.cholesky(part.flip(0, 1)).flip(0, 1).diagonal()
            for part in (whole[:4, :4], whole[4:5, 4:5], whole[5:, 5:])
        ]
    )
    torch.testing.assert_close(rows.lengths.double(), lengths, rtol=1e-5, atol=0)


def test_what_is_not_believed_leaves_the_diagonal():
    blocks, rows, _ = correlated([6], 6, floor=0.1, keep=0.0)
    diagonal_ = blocks[0].diagonal()
    torch.testing.assert_close(rows.lengths.double().square(), diagonal_ + 0.1 * diagonal_.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [([3], 3), ([2, 3], 2), ([70], 64)])
def test_rows_that_feel_each_other_are_the_textbook_s_kronecker_lattice(rows, size, dtype):
    """One vector of all weights, column after column and row after row, in the metric A (x) G. Compiled and plain."""
    columns, count = 6 if sum(rows) < 10 else 3, sum(rows)
    _, known, whole = correlated(rows, size, seed=5)
    metric = random_metric(columns, 8)
    order = column_order("activation", metric, columns)
    basis, lengths = lengths_of(metric, order, 0.0)
    row_steps, column_steps = snapped(0.3 / known.lengths), snapped(lengths.reciprocal())
    weight = 4 * torch.randn(count, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = unboxed_babai(weight.to(dtype), basis.to(dtype), order, row_steps.to(dtype), column_steps.to(dtype), known)
    wide = Grid(8)
    object.__setattr__(wide, "bits", 40)
    flat = torch.arange(columns * count)
    places = torch.cat([flat.view(columns, count)[column] for column in order])
    vector = weight.T.reshape(1, -1)
    steps = (column_steps[:, None] * row_steps).reshape(1, -1).double()
    expected = textbook_babai(vector, torch.kron(metric, whole), places, steps, wide).view(columns, count).T
    agree = (found.double() == expected).double().mean().item()
    assert agree == 1.0 if dtype == torch.float64 else agree > 0.99


@pytest.mark.parametrize("method", ["lattice", "lattice-priced"])
def test_codes_that_leave_32_bits_are_told(method):
    """A row takes over the errors of those before it, counted in its own step: one of 1e20 beside others of one."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(200, 40, generator=generator), torch.randn(12, 40, generator=generator)
    weight[0] *= 1e20
    _, rows, _ = correlated([12], 12, seed=1, floor=0.01, keep=0.9)
    problem_ = Problem(weight, inputs.T @ inputs, tokens=200, step=0.2, rows=rows)
    with pytest.raises(NotPositiveDefinite, match="leave 32 bits"):
        METHODS[method](problem_)


def test_threads_do_not_follow_into_a_forked_child():
    """A pool made before the fork would wait for ever."""
    program = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from geoquant.threads import in_parts\n"
        "in_parts(lambda own: None, 4)\n"
        "child = os.fork()\n"
        "if not child: in_parts(lambda own: None, 4); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("rows", [[64] * 5, [64, 37, 64], [9, 6], [3, 3, 1], [1] * 40])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_compiled_blocks_are_the_plain_ones_on_any_threads(rows, threads):
    """Several panels; blocks of odd sizes, in odd numbers, with and without company."""
    columns, size = 150, max(rows)
    known = correlated(rows, size, seed=3)[1] if size > 1 else None
    metric = random_metric(columns, 8)
    order = column_order("activation", metric, columns)
    basis, lengths = lengths_of(metric, order, 0.01)
    row_steps = snapped(0.3 / known.lengths) if known else torch.full((sum(rows),), 0.25)
    column_steps = snapped(lengths.reciprocal())
    weight = 2 * torch.randn(sum(rows), columns, generator=torch.Generator().manual_seed(1))
    plain = unboxed_babai(weight.double(), basis, order, row_steps.double(), column_steps.double(), known)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = unboxed_babai(weight, basis.float(), order, row_steps.float(), column_steps.float(), known)
    finally:
        torch.set_num_threads(before)
    # A near-tie falls to the other side now and then, and moves what comes after it in its block.
    block = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    same = torch.zeros(len(rows)).index_add_(0, block, (found != plain).any(1).float()) == 0
    assert same.float().mean() > (0.5 if size == 64 else 0.85)
    assert (found == plain).float().mean() > 0.9


def test_expected_loss_is_a_twelfth_of_the_squared_step_whatever_feels_what():
    """tr(G E A E^T) / (rows columns) = D^2 / 12 with row and column steps from both lengths."""
    _, known, whole = correlated([64, 64, 40], 64, seed=9)
    given_ = problem(columns=120, count=168, damping=0.01, heldout=None, order="natural", rows=known)
    solved = solve(given_)
    error = (solved.dequantize() - given_.weight).double()
    metric = damped(given_.hessian / given_.tokens, 0.01).double()
    loss = ((whole @ error @ metric) * error).sum() / error.numel()
    assert loss.item() == pytest.approx(0.05**2 / 12, rel=0.05)


def test_a_row_s_error_in_the_metric_of_its_inputs_alone():
    """Expected and largest error where rows take over each other's: 20000 random targets, known to one per cent."""
    _, known, _ = correlated([6], 6, seed=4)
    steps = snapped(0.3 / known.lengths)
    expected, worst = known.error_squares(steps)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(20):
        weight = 20 * torch.randn(6, 1000, generator=generator)
        # Columns that are strangers to each other, with length one and step one.
        codes = unboxed_babai(weight, torch.eye(1000), torch.arange(1000), steps, torch.ones(1000), known)
        errors.append((codes * steps[:, None] - weight).square())
    error = torch.cat(errors, dim=1)
    torch.testing.assert_close(error.mean(1), expected / 12, rtol=0.05, atol=0)
    assert (error <= worst[:, None] / 4 * (1 + 1e-3)).all()
    assert (expected > steps.square() * 0.999).all()


def test_a_block_without_any_gradient_counts_a_millionth():
    blocks = torch.zeros(2, 3, 3)
    blocks[0] = torch.eye(3)
    rows = row_metric(blocks, (3, 3), floor=0.05, keep=0.7)
    ratio = rows.lengths[3:] / rows.lengths[:3]
    torch.testing.assert_close(ratio, torch.full((3,), 1e-3))
    nothing = row_metric(torch.zeros(1, 3, 3), (3,), floor=0.05, keep=0.7)
    torch.testing.assert_close(nothing.lengths, torch.ones(3))


def test_single_rows_have_the_floor_of_their_site():
    """A share of the row itself would only change the unit: a row without gradient would get a step without end."""
    curvature = torch.tensor([0.0, 2.0, 4.0, 0.0, 30.0])
    rows = row_metric(curvature[:, None, None], (1,) * 5, floor=0.1, keep=1.0, sites=[3, 2])
    expected = curvature + 0.1 * torch.tensor([2.0, 2.0, 2.0, 15.0, 15.0])
    torch.testing.assert_close(rows.lengths.square(), expected)
    blocks = 0.5 * torch.eye(4).expand(2, 4, 4) + 0.5  # where rows have neighbours, sites change nothing
    alone, stacked = (row_metric(blocks, (4, 4), floor=0.1, keep=0.7, sites=sites) for sites in (None, [8]))
    torch.testing.assert_close(alone.factor, stacked.factor, rtol=0, atol=0)


def problem(columns=60, count=12, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    values = {
        "heldout": random_metric(columns, seed).float() * 40,
        "tokens": 400,
        "step": 0.05,
        "rows": diagonal(0.1 + torch.rand(count, generator=generator)),
        "order": "activation",
    }
    weight = torch.randn(count, columns, generator=generator)
    return Problem(weight, random_metric(columns, seed).float() * 360, **(values | changes))


def test_the_solution_is_what_its_parts_say():
    solved = solve(problem())
    values = solved.dequantize()
    rows, columns = (torch.exp2(index.double() / 8) for index in (solved.row_exponents, solved.column_exponents))
    torch.testing.assert_close(values.double(), solved.codes.double() * rows[:, None] * columns, rtol=2**-7, atol=0)
    part = solved.rows(3, 7)
    torch.testing.assert_close(part.dequantize(), values[3:7])


def test_every_weight_costs_the_same_whatever_its_row_and_column():
    """G_ii times the squared error of row i is D^2/12 a column, up to the rounding of steps."""
    given_ = problem(columns=100, count=400, damping=0.01, heldout=None, order="natural")
    solved = solve(given_)
    metric = damped(given_.hessian / given_.tokens, 0.01)
    curvature = given_.rows.lengths.square()
    costs = column_error((solved.dequantize() - given_.weight).double(), metric.double()) * curvature
    assert costs.mean().item() == pytest.approx(100 * 0.05**2 / 12, rel=0.05)
    few, many = costs[curvature < 0.3].mean(), costs[curvature > 0.8].mean()
    assert few.item() == pytest.approx(many.item(), rel=0.1)


def test_a_finer_step_errs_less():
    errors = []
    for step in (0.2, 0.1, 0.05):
        given_ = problem(step=step)
        difference = (solve(given_).dequantize() - given_.weight).double()
        errors.append(column_error(difference, given_.pooled.double()).sum().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_damping_does_not_make_a_site_finer():
    """Lengths grow with the damping; the price of a unit of length, measured on held-out tokens, takes it back."""
    light, heavy = (choose_damping(problem(damping=value), torch.arange(60)) for value in (0.003, 0.3))
    assert light[1] > heavy[1]
    same = problem(heldout=None)
    assert choose_damping(same, torch.arange(60)) == (0.01, 1.0)


def test_a_price_is_that_of_the_closed_form():
    given_ = problem(damping=0.03)
    order = column_order("activation", given_.hessian, 60)
    factor = compensation_factor(given_.hessian.double(), order, 0.03)
    lengths = torch.empty(len(factor), dtype=factor.dtype)
    lengths[order] = factor.diagonal().reciprocal()
    heldout = given_.heldout.double() * (given_.hessian.trace() / given_.heldout.trace()).item()
    rows = torch.diagonal(factor @ heldout[order][:, order] @ factor.T)
    _, price = choose_damping(given_, order)
    assert price == pytest.approx(rows.flip(0)[::4].mean().item(), rel=1e-3)
    assert (lengths > 0).all()


def test_columns_that_share_a_step_err_together_as_each_would_alone():
    """Steps are one over what stands for a length: each group then costs its number of columns."""
    lengths = 0.1 + torch.rand(9, generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([0, 1, 1, 2, 3, 1, 4, 4, 5])
    found = tied(lengths, ties)
    for group in range(6):
        own = ties == group
        assert len(found[own].unique()) == 1
        torch.testing.assert_close((lengths / found)[own].square().sum(), torch.tensor(float(own.sum())))
    solved = solve(problem(columns=9, ties=ties)).column_exponents
    assert all(len(solved[ties == group].unique()) == 1 for group in range(6))
    assert len(solved.unique()) > 3


def test_where_the_metric_fails_every_weight_is_rounded_alone():
    broken = dataclasses.replace(problem(), hessian=torch.full((60, 60), torch.nan))
    with pytest.raises(NotPositiveDefinite):
        solve(broken)
    solved = nearest(broken)
    steps = steps_of(solved.row_exponents)[:, None]
    assert ((solved.dequantize() - broken.weight).abs() <= steps / 2 * 1.01).all()


@pytest.mark.parametrize("size", [1e10, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_alone_no_row_is_lost_beside_a_huge_one(size, dtype):
    """Where one row makes codes leave 32 bits, the others must survive what is done instead."""
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] *= size
    weight[5] = 0
    weight[7] *= 1e-30
    solved = nearest(Problem(weight, torch.eye(40)))
    error = (solved.dequantize().double() - weight.double()).square().mean(1).sqrt()
    kept = torch.arange(12) != 7
    assert (error[kept] <= 0.03 * weight.double().square().mean(1).sqrt()[kept]).all()
    assert solved.row_exponents[[5, 7]].max() < 0  # the steps of the usual rows, not of the huge one


def test_rounded_alone_small_weights_in_half_precision_survive():
    """Their squares are below what float16 holds."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight[2] *= 1e-4
    weight = weight.half()
    found = nearest(Problem(weight, torch.eye(40))).dequantize()
    assert (found[2] - weight[2]).norm() < 0.1 * weight[2].float().norm()


@pytest.mark.parametrize("method", ["lattice", "lattice-priced"])
def test_huge_rows_that_feel_each_other_are_solved(method):
    """Squares of their steps are beyond single precision: neither codes nor the certificate may be."""
    given_ = problem(count=12, rows=correlated([12], 12, seed=1, floor=0.01, keep=0.9)[1])
    given_ = dataclasses.replace(given_, weight=1e30 * given_.weight, step=5e28)
    solved = METHODS[method](given_)
    assert (solved.dequantize() / 1e30 - given_.weight / 1e30).abs().max() < 1
    assert solved.row_errors.isfinite().all()
    plain = METHODS[method](dataclasses.replace(given_, weight=given_.weight / 2.0**96, step=5e28 / 2.0**96))
    assert torch.equal(solved.codes, plain.codes)


def test_codes_take_the_smallest_type_that_holds_them():
    for step, wanted in ((1.0, torch.int8), (0.01, torch.int16), (1e-5, torch.int32)):
        solved = solve(problem(step=step))
        assert solved.codes.dtype == wanted
        limits = torch.iinfo(wanted)
        assert limits.min < solved.codes.min()
        assert solved.codes.max() < limits.max


@pytest.mark.parametrize("method", ["lattice", "lattice-priced", "lattice-priced-descent"])
@pytest.mark.parametrize("size", [1e9, 1e30])
def test_no_code_leaves_its_type(method, size):
    """Beyond 2^31 a code came back with the other sign: a row with such a weight gets a longer step."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 9, generator=generator), torch.randn(6, 9, generator=generator)
    weight[2, 3] = size
    solution = METHODS[method](Problem(weight, inputs.T @ inputs, tokens=50, step=0.05))
    found = solution.dequantize()
    assert found[2, 3] == pytest.approx(size, rel=1e-6)
    assert solution.codes.abs().max() < 2**31 - 1
    others = torch.arange(6) != 2
    assert (found - weight)[others].abs().max() < 0.1

"""The boxed recursion against textbook Babai, GPTQ with an explicit inverse, and enumeration."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.babai import PANEL, boxed_babai
from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.certificate import certificate, squared_steps
from geoquant.lattice.grid import Grid, search_scales
from geoquant.lattice.order import ORDERS, column_order
from geoquant.methods import METHODS, Problem
from oracles.lattice import closest_vectors, column_error, naive_gptq, random_metric, textbook_babai

DAMPING = 0.01
# Groups of one column, odd ones, ones that straddle panels (64), ones larger than everything.
GROUP_SIZES = (1, 7, 16, 48, 64, 100, 1000)


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(weight, metric, order, grid, free=0, scales=None, zeros=None):
    factor = compensation_factor(metric, order, DAMPING)
    return boxed_babai(weight, factor, order, grid, metric.diagonal(), free=free, scales=scales, zeros=zeros)


def values_of(result, order, grid, free):
    """The reader's weights (out, in) of a BoxedCodes."""
    group = torch.arange(len(order)) // grid.group_size
    codes = result.codes.double()
    offset = 0.0 if result.zeros is None else result.zeros[group]
    values = (codes - offset) * result.scales[group]
    if free:
        values[order[-free:]] = result.free
    return values.T


def spread(per_group, columns, group_size):
    """(groups, out) to (out, in)."""
    return per_group[torch.arange(columns) // group_size].T.contiguous()


cases = {
    "columns": st.sampled_from([1, 2, 15, 16, 17, 33, 63, 64, 65, 80, 100, 129, 140]),
    "group_size": st.sampled_from(GROUP_SIZES),
    "bits": st.sampled_from([2, 3, 4, 8]),
    "symmetric": st.booleans(),
    "name": st.sampled_from(sorted(ORDERS)),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=30, deadline=None)
@given(clip=st.booleans(), **cases)
def test_gptq_is_babai_with_fixed_steps(columns, group_size, bits, symmetric, name, seed, clip):
    """Code for code, with and without clipping, in every order."""
    grid, weight, metric = Grid(bits, group_size, symmetric), weights(3, columns, seed), random_metric(columns, seed)
    order = column_order(name, metric, group_size)
    generator = torch.Generator().manual_seed(seed)
    scales = (
        (0.3 if clip else 40.0)
        / 2**bits
        * (1 + torch.rand(grid.groups(columns), 3, generator=generator, dtype=torch.float64))
    )
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 2**bits, scales.shape, generator=generator).double()
    result = solved(weight, metric, order, grid, scales=scales.clone(), zeros=None if zeros is None else zeros.clone())
    steps = spread(scales, columns, group_size)
    offsets = None if zeros is None else spread(zeros, columns, group_size)
    expected = textbook_babai(weight, damped(metric, DAMPING), order, steps, grid, offsets)
    torch.testing.assert_close(result.codes.T.double(), expected, rtol=0, atol=0)
    assert result.codes.dtype == (torch.int8 if symmetric else torch.uint8)


def smooth_search(block, importance, grid):
    """A step that changes little when the weights do: the real search may fall either way where steps tie."""
    step = (block.square() * importance[:, None]).sum(0).div(importance.sum()).sqrt() / grid.highest
    return step, None if grid.symmetric else torch.full_like(step, grid.highest // 2)


@settings(max_examples=30, deadline=None)
@given(share=st.sampled_from([0.0, 0.0, 0.02, 0.3, 0.9]), **cases)
def test_scales_are_searched_on_the_fully_updated_weights(columns, group_size, bits, symmetric, name, seed, share):
    """Every group's step comes from the weights that a naive right-looking update leaves at that moment."""
    grid, weight, metric = Grid(bits, group_size, symmetric), weights(3, columns, seed), random_metric(columns, seed)
    free = min(int(share * columns), columns - 1)
    last = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[:free]
    order = column_order(name, metric, group_size, last=last)
    with mock.patch("geoquant.lattice.babai.search_scales", smooth_search):
        result = solved(weight, metric, order, grid, free=free)
    expected = naive_gptq(
        weight,
        damped(metric, DAMPING),
        order,
        grid,
        free=free,
        search=lambda block, members: smooth_search(block, metric.diagonal()[members], grid),
    )
    torch.testing.assert_close(result.scales, expected.scales, rtol=1e-9, atol=0)
    if not symmetric:
        torch.testing.assert_close(result.zeros, expected.zeros, rtol=0, atol=0)
    on_grid = order[: columns - free]
    torch.testing.assert_close(result.codes[on_grid].T.double(), expected.codes[:, on_grid], rtol=0, atol=0)
    torch.testing.assert_close(values_of(result, order, grid, free), expected.values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.clipped, expected.clipped.double(), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_searched_scales_agree_with_the_oracle(name):
    """The real search, code for code in float64; in float32, as used, near-ties may fall either way."""
    columns = 2 * PANEL + 21
    grid, weight, metric = Grid(4, 48), weights(16, columns, 1), random_metric(columns, 1)
    order = column_order(name, metric, 48)
    exact = naive_gptq(
        weight,
        damped(metric, DAMPING),
        order,
        grid,
        search=lambda block, members: search_scales(block, metric.diagonal()[members], grid),
    )
    double = solved(weight, metric, order, grid)
    torch.testing.assert_close(double.scales, exact.scales, rtol=0, atol=0)
    torch.testing.assert_close(double.codes.T.double(), exact.codes, rtol=0, atol=0)
    result = solved(weight.float(), metric.float(), order, grid)
    assert (result.codes.T.double() != exact.codes).double().mean() < 0.02
    found = column_error(values_of(result, order, grid, 0) - weight, metric)
    expected = column_error(exact.values - weight, metric)
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 4),
    bits=st.sampled_from([2, 3]),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(ORDERS)),
)
def test_error_lies_between_the_optimum_and_the_bound(columns, bits, seed, name):
    """Never below the closest vector; never above 1/4 sum r^2 s^2 where no code was clipped."""
    grid, metric = Grid(bits, 1000), random_metric(columns, seed)
    weight, steps = 0.3 * weights(8, columns, seed), torch.full((1, 8), 1.0 if bits == 2 else 0.4, dtype=torch.float64)
    order = column_order(name, metric, 1000)
    result = solved(weight, metric, order, grid, scales=steps)
    target = damped(metric, DAMPING)
    error = column_error(values_of(result, order, grid, 0) - weight, target)
    optimum = closest_vectors(weight, target, steps[0], grid)
    assert (error >= optimum * (1 - 1e-9)).all()
    lengths = compensation_factor(metric, order, DAMPING).diagonal().reciprocal()
    bound = (lengths.square().sum() * steps[0] ** 2) / 4
    inside = result.clipped == 0
    assert (error[inside] <= bound[inside] * (1 + 1e-9)).all()


def test_a_diagonal_metric_is_solved_exactly():
    """Without correlations the nearest plane is the nearest point."""
    metric = torch.diag(torch.tensor([3.0, 0.1, 7.0, 1.0], dtype=torch.float64))
    weight, steps = weights(20, 4, 0), torch.full((1, 20), 0.3, dtype=torch.float64)
    result = solved(weight, metric, torch.arange(4), Grid(3, 4), scales=steps)
    error = column_error(values_of(result, torch.arange(4), Grid(3, 4), 0) - weight, damped(metric, DAMPING))
    torch.testing.assert_close(error, closest_vectors(weight, damped(metric, DAMPING), steps[0], Grid(3, 4)))


def test_large_free_columns_do_not_stretch_the_steps():
    """A kept outlier shares its group with ordinary weights, whose step must be theirs alone."""
    weight, metric = 0.1 * weights(4, 64, 3), torch.eye(64, dtype=torch.float64)
    outlier = weight.clone()
    outlier[:, 5] = 50.0
    order = column_order("natural", metric, 64, last=torch.tensor([5]))
    found = solved(outlier, metric, order, Grid(4, 64), free=1)
    expected = solved(weight, metric, order, Grid(4, 64), free=1)
    torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=0)
    torch.testing.assert_close(found.free[0], torch.full((4,), 50.0, dtype=torch.float64))


def test_certificate_bounds_what_a_solve_achieves():
    """The report's bound and expectation against the achieved error, without clipping, on the damped metric."""
    columns, rows = 150, 64
    metric = random_metric(columns, 5)
    order = column_order("group-aware", metric, 48)
    scales = torch.full((4, rows), 0.5, dtype=torch.float64)
    weight = weights(rows, columns, 5)
    result = solved(weight, metric, order, Grid(8, 48), scales=scales)
    lengths = torch.empty(columns, dtype=torch.float64)
    lengths[order] = compensation_factor(metric, order, DAMPING).diagonal().reciprocal()
    kept = torch.zeros(0, dtype=torch.int64)
    values = values_of(result, order, Grid(8, 48), 0)
    shown = certificate(
        weight, values, damped(metric, DAMPING), metric, squared_steps(scales.T, lengths, kept, 48), 0.0
    )
    assert result.clipped.sum() == 0
    assert shown.error <= shown.bound
    assert shown.error == pytest.approx(shown.expected_error, rel=0.15)
    energy = column_error(weight, damped(metric, DAMPING)).sum()
    assert shown.bound == pytest.approx((0.25 * (lengths * 0.5).square().sum() * rows / energy).item())


def test_method_reports_lengths_by_column():
    """`gram_schmidt` of a solution: distance of each input from the span of those processed after it."""
    metric, weight = random_metric(40, 2), weights(3, 40, 2)
    solution = METHODS["babai"](Problem(weight.float(), metric.float(), damping=0.05, order="activation"))
    target = damped(metric, 0.05)
    order = column_order("activation", metric.float(), 64)
    for position in (0, 7, 39):
        column, after = order[position], order[position + 1 :]
        residual = target[column, column]
        if len(after):
            cross = target[after][:, column]
            residual = residual - cross @ torch.linalg.solve(target[after][:, after], cross)
        assert solution.gram_schmidt[column].item() == pytest.approx(residual.sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [7, PANEL, 2 * PANEL + 21])
def test_the_compiled_panels_are_the_plain_ones(symmetric, columns):
    """Float32 on a CPU is compiled, float64 is not: the same codes with fixed steps, the same steps when searched."""
    weight, metric, grid = weights(150, columns, 4), random_metric(columns, 4), Grid(3, 16, symmetric)
    order = column_order("group-aware", metric, 16)
    factor, importance = compensation_factor(metric, order, DAMPING), metric.diagonal()
    plain = boxed_babai(weight, factor, order, grid, importance)
    single = weight.float(), factor.float(), order, grid, importance.float()
    zeros = None if plain.zeros is None else plain.zeros.float()
    found = boxed_babai(*single, scales=plain.scales.float(), zeros=zeros)
    # A near-tie may fall to the other side, and then moves what comes after it in its row.
    assert (found.codes == plain.codes).all(0).float().mean() > 0.95
    assert (found.clipped == plain.clipped).float().mean() > 0.95
    searched = boxed_babai(*single)
    assert (searched.scales.double() == plain.scales).all(0).float().mean() > 0.9

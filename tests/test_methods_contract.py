"""What every method of the box promises, whatever it does inside. A new method is tested by entering BOX; the lattice
has codes of its own (test_unboxed.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import NotPositiveDefinite
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import ORDERS
from geoquant.methods import BOX as METHODS
from geoquant.methods import Problem
from oracles.lattice import random_metric


def make(columns=50, rows=6, seed=0, **changes) -> Problem:
    torch.manual_seed(seed)
    defaults = {"heldout": random_metric(columns, seed + 1).float() / 7, "keep": 0.05}
    return Problem(0.02 * torch.randn(rows, columns), random_metric(columns, seed).float(), **(defaults | changes))


def relative_error(problem: Problem, values: torch.Tensor) -> float:
    """`tr(D A D^T) / tr(W A W^T)` on all tokens, in double precision."""
    metric = problem.pooled.double()
    difference, weight = values.double() - problem.weight.double(), problem.weight.double()
    return (((difference @ metric) * difference).sum() / ((weight @ metric) * weight).sum()).item()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(METHODS)),
    columns=st.sampled_from([1, 2, 17, 64, 100]),
    group_size=st.sampled_from([1, 7, 64, 1000]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    order=st.sampled_from(sorted(ORDERS)),
    damping=st.sampled_from([None, 0.01]),
    keep=st.sampled_from([0.0, 0.1, 0.5]),
    static=st.booleans(),
    heldout=st.booleans(),
    seed=st.integers(0, 999),
)
def test_solutions_are_well_formed(
    name, columns, group_size, bits, symmetric, order, damping, keep, static, heldout, seed
):
    grid = Grid(bits, group_size, symmetric)
    changes = {"grid": grid, "order": order, "damping": damping, "keep": keep, "static_scales": static}
    problem = make(columns, 4, seed, **changes)
    if not heldout:
        problem = dataclasses.replace(problem, heldout=None)
    before = [tensor.clone() for tensor in (problem.weight, problem.hessian)]
    solution = METHODS[name](problem)
    assert torch.equal(problem.weight, before[0])
    assert torch.equal(problem.hessian, before[1])

    groups = grid.groups(columns)
    assert solution.codes.shape == (4, columns)
    assert solution.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert grid.lowest <= int(solution.codes.min())
    assert int(solution.codes.max()) <= grid.highest
    assert solution.scales.shape == (4, groups)
    assert solution.scales.dtype == torch.bfloat16
    assert solution.scales.isfinite().all()
    assert (solution.scales != 0).all()
    if symmetric:
        assert solution.zero_points is None
    else:
        assert solution.zero_points.dtype == torch.uint8
        assert solution.zero_points.shape == (4, groups)
        assert int(solution.zero_points.max()) <= grid.highest
    kept = solution.kept_index
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert solution.kept_weight.shape == (4, len(kept))
    assert solution.kept_weight.dtype == torch.bfloat16
    assert solution.gram_schmidt.shape == (columns,)
    assert (solution.gram_schmidt >= 0).all()
    assert solution.saturated.shape == (4,)
    assert ((solution.saturated >= 0) & (solution.saturated <= 1)).all()
    assert solution.damping >= 0
    assert all(tensor.is_contiguous() for tensor in (solution.codes, solution.scales, solution.kept_weight))
    assert solution.dequantize().isfinite().all()
    # Every method must at least beat storing nothing.
    assert relative_error(problem, solution.dequantize()) < 1.0


def test_rows_of_stacked_sites_fall_apart_again(method):
    problem = make(rows=9, grid=Grid(4, 16, False))
    solution = method(problem)
    parts = [solution.rows(0, 2), solution.rows(2, 9)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), solution.dequantize())
    parts[0].codes.zero_()
    assert solution.codes.any()


def test_every_row_is_solved_alone(method):
    """Stacking the sites that share an input changes nothing (up to near-ties in single precision)."""
    problem = make(rows=12, keep=0.0)
    together = method(problem)
    for rows in (slice(0, 5), slice(5, 12)):
        alone = method(dataclasses.replace(problem, weight=problem.weight[rows]))
        assert alone.damping == together.damping
        assert (alone.codes != together.codes[rows]).float().mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
def test_same_problem_same_bits(method, symmetric):
    problem = make(grid=Grid(3, 16, symmetric))
    first, second = method(problem), method(problem)
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("symmetric", [True, False])
def test_units_do_not_matter(method, symmetric):
    """Powers of two are exact: twice the weights give twice the steps; the units of the metric give nothing."""
    problem = make(grid=Grid(4, 16, symmetric))
    plain = method(problem)
    doubled = method(dataclasses.replace(problem, weight=2 * problem.weight))
    assert torch.equal(doubled.codes, plain.codes)
    assert torch.equal(doubled.scales, 2 * plain.scales)
    for units in (2.0**-60, 2.0**40):
        other = method(dataclasses.replace(problem, hessian=units * problem.hessian, heldout=units * problem.heldout))
        assert torch.equal(other.codes, plain.codes)
        assert torch.equal(other.kept_index, plain.kept_index)


def test_more_bits_less_error(method):
    errors = [relative_error(p, method(p).dequantize()) for p in (make(grid=Grid(b, 16)) for b in (2, 3, 4, 6, 8))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rtn"])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_compensation_beats_rounding(name, order):
    problem = make(order=order, damping=0.01, grid=Grid(3, 16))
    solved, rounded = (METHODS[key](problem) for key in (name, "rtn"))
    assert relative_error(problem, solved.dequantize()) < relative_error(problem, rounded.dequantize())


@pytest.mark.parametrize("kind", ["zero", "one token", "few tokens", "dead columns", "identical columns"])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_degenerate_metrics(method, kind, order):
    """Never a crash, never a lost weight where the metric says nothing."""
    problem = make(heldout=None, order=order, keep=0.05)
    metric = problem.hessian
    if kind == "zero":
        metric = torch.zeros_like(metric)
    elif kind in ("one token", "few tokens"):
        metric = random_metric(50, 3, rank=1 if kind == "one token" else 4).float()
    elif kind == "dead columns":
        metric[10:40] = metric[:, 10:40] = 0
    else:
        metric = torch.ones_like(metric)
    solution = method(dataclasses.replace(problem, hessian=metric))
    values = solution.dequantize()
    assert values.isfinite().all()
    if kind in ("zero", "dead columns"):
        dead = slice(None) if kind == "zero" else slice(10, 40)
        error = (values - problem.weight)[:, dead].square().sum() / problem.weight[:, dead].square().sum()
        assert error < 0.05


@pytest.mark.parametrize("weight", ["zero", "zero rows", "huge"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_weights(method, weight, symmetric):
    problem = make(grid=Grid(4, 16, symmetric))
    values = problem.weight.clone()
    if weight == "zero":
        values.zero_()
    elif weight == "zero rows":
        values[::2] = 0
    else:
        values[1, 20] = 1e6
    problem = dataclasses.replace(problem, weight=values)
    solution = method(problem)
    result = solution.dequantize()
    assert result.isfinite().all()
    if weight != "huge":
        assert result[::2].abs().max() < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_metric_is_refused_or_ignored(method, value):
    """Either NotPositiveDefinite, which the caller knows how to answer, or finite weights."""
    problem = make()
    metric = problem.hessian.clone()
    metric[3] = metric[:, 3] = value
    try:
        solution = method(dataclasses.replace(problem, hessian=metric))
    except NotPositiveDefinite:
        return
    assert solution.dequantize().isfinite().all()
    assert solution.gram_schmidt.isfinite().all()

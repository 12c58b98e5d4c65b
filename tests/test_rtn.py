"""Round to nearest: every code is the nearest point of its grid, and nothing depends on anything else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from geoquant.lattice.basis import NotPositiveDefinite, damped
from geoquant.lattice.grid import Grid, search_scales
from geoquant.lattice.rows import single_rows
from geoquant.lattice.unboxed import steps_of
from geoquant.methods import Problem, lattice
from geoquant.methods.rtn import solve, solve_lattice
from oracles.lattice import column_error, random_metric


def problem(symmetric: bool = True, bits: int = 3, group_size: int = 10, **changes) -> Problem:
    torch.manual_seed(0)
    metric = random_metric(24, 0).float()
    return Problem(torch.randn(5, 24), metric, grid=Grid(bits, group_size, symmetric), **changes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_gets_its_nearest_point(symmetric):
    task = problem(symmetric)
    solution = solve(task)
    values = solution.dequantize()
    points = torch.arange(task.grid.lowest, task.grid.highest + 1).float()
    outside = torch.zeros(5)
    for row in range(5):
        for column in range(24):
            group = column // 10
            zero = 0 if symmetric else int(solution.zero_points[row, group])
            step = float(solution.scales[row, group])
            choices = step * (points - zero)
            distance = (choices - task.weight[row, column]).abs()
            assert abs(values[row, column] - task.weight[row, column]) <= distance.min() + 1e-6
            nearest_beyond = round(float(task.weight[row, column]) / step) + zero
            outside[row] += not task.grid.lowest <= nearest_beyond <= task.grid.highest
    torch.testing.assert_close(solution.saturated, outside / 24)


def test_steps_are_searched_with_all_tokens():
    """Held-out tokens count: there is nothing to choose on them."""
    task = problem()
    other = random_metric(24, 9).float()
    together = solve(problem(heldout=other))
    diagonal = (task.hessian + other).diagonal()
    for group in range(3):
        part = slice(group * 10, group * 10 + 10)
        expected, _ = search_scales(task.weight.T[part].contiguous(), diagonal[part], task.grid)
        torch.testing.assert_close(together.scales[:, group].float(), expected, rtol=0, atol=0)


def test_the_metric_off_its_diagonal_and_the_order_do_not_matter():
    plain, other = problem(), problem(order="min-pivot", damping=0.3, static_scales=True)
    diagonal = Problem(plain.weight, torch.diag(plain.hessian.diagonal()), grid=plain.grid)
    for task in (other, diagonal):
        assert torch.equal(solve(task).codes, solve(plain).codes)


def test_a_damaged_metric_is_ignored():
    """The fallback of every method: NaN moments still give the plain squared-error codes."""
    task = problem()
    damaged = solve(Problem(task.weight, torch.full((24, 24), torch.nan), grid=task.grid))
    plain = solve(Problem(task.weight, torch.eye(24), grid=task.grid))
    assert torch.equal(damaged.codes, plain.codes)
    assert damaged.gram_schmidt.isfinite().all()


def test_lengths_are_input_amplitudes():
    task = problem()
    torch.testing.assert_close(solve(task).gram_schmidt.square(), task.hessian.diagonal())


# --- on the lattice


def on_the_lattice(metric, rows=40, **changes) -> Problem:
    columns = len(metric)
    generator = torch.Generator().manual_seed(3)
    weight, importance = torch.randn(rows, columns, generator=generator), torch.rand(rows, generator=generator) + 0.1
    return Problem(weight, metric, step=0.05, rows=single_rows(importance), damping=0.01, **changes)


def test_where_columns_and_rows_are_strangers_rounding_is_babai():
    """A diagonal metric has nothing to compensate: same lengths, steps and codes."""
    task = on_the_lattice(torch.diag(random_metric(24, 0).diagonal()).float())
    rounded, planes = solve_lattice(task), lattice.solve(task)
    for one, other in zip(vars(rounded).values(), vars(planes).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-6, atol=0)


def test_every_weight_has_its_nearest_code_and_costs_the_same():
    task = on_the_lattice(random_metric(24, 0).float())
    found = solve_lattice(task)
    steps = steps_of(found.row_exponents)[:, None] * steps_of(found.column_exponents)
    assert ((task.weight - found.dequantize()).abs() <= steps * 0.5001).all()
    importance = task.rows.factor[:, 0, 0] ** -2
    costs = importance[:, None] * damped(task.hessian, 0.01).diagonal() * steps.square()
    # Two steps off by a sixteenth of an octave each.
    torch.testing.assert_close(costs.log2(), torch.full_like(costs, 2 * math.log2(task.step)), rtol=0, atol=0.27)


def test_its_expected_error_is_met_by_random_weights():
    """Independent roundings: sum_j A_jj s_j^2 / 12 a row, whatever lies off the diagonal; within 5%."""
    metric = damped(random_metric(24, 1), 0.01).float()
    task = on_the_lattice(metric, rows=4000)
    found = solve_lattice(replace(task, damping=0.0))
    error = column_error((task.weight - found.dequantize()).double(), metric.double()).sum().item()
    assert error == pytest.approx(found.squares.expected / 12, rel=0.05)


def test_a_lattice_without_a_sound_diagonal_is_refused():
    task = on_the_lattice(random_metric(24, 0).float())
    for spoiled in (torch.zeros(24, 24), torch.full((24, 24), torch.nan)):
        with pytest.raises(NotPositiveDefinite):
            solve_lattice(replace(task, hessian=spoiled))

"""Round to nearest: every code is the nearest point of its grid, and nothing depends on anything else."""

from __future__ import annotations

import pytest
import torch

from geoquant.lattice.grid import Grid, search_scales
from geoquant.methods import Problem
from geoquant.methods.rtn import solve
from oracles.lattice import random_metric


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

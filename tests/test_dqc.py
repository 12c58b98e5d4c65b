"""Kept columns: which they are, what they become, and that nothing of them is left in the codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import damped
from geoquant.lattice.grid import Grid
from geoquant.methods import METHODS, Problem
from geoquant.methods.dqc import hop_scores, kept_columns, solve
from oracles.lattice import column_error, random_metric


def problem(columns=40, rows=8, seed=0, **changes) -> Problem:
    torch.manual_seed(seed)
    settings = {"grid": Grid(3, 16), "damping": 0.01, "keep": 0.1} | changes
    return Problem(torch.randn(rows, columns), random_metric(columns, seed).float(), **settings)


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 12), seed=st.integers(0, 999), damping=st.sampled_from([0.003, 0.1]))
def test_hop_is_the_error_left_after_all_others_adapt(columns, seed, damping):
    """Least squares, one column fixed at its rounding error at a time, on explicit inputs."""
    metric = random_metric(columns, seed)
    difference = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = torch.linalg.cholesky(damped(metric, damping)).T  # rows whose Gram matrix is the damped metric
    expected = []
    for column in range(columns):
        rest = [other for other in range(columns) if other != column]
        total = 0.0
        for row in range(3):
            output = inputs[:, column] * difference[row, column]
            if rest:
                answer = torch.linalg.lstsq(inputs[:, rest], -output[:, None]).solution
                output = output + (inputs[:, rest] @ answer)[:, 0]
            total += output.square().sum().item()
        expected.append(total)
    torch.testing.assert_close(
        hop_scores(difference, metric, damping), torch.tensor(expected).double(), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["natural", "group-aware", "min-pivot"])
@pytest.mark.parametrize("static", [False, True])
def test_kept_columns_are_the_exact_minimiser(symmetric, order, static):
    """`W_O + (W_R - Q_R) A_RO A_OO^-1` on the damped pooled metric, to bfloat16."""
    task = problem(grid=Grid(3, 16, symmetric), order=order, static_scales=static, heldout=random_metric(40, 5).float())
    solution = solve(task)
    kept = solution.kept_index
    rest = torch.tensor([column for column in range(40) if column not in kept.tolist()])
    metric = damped(task.hessian.double() + task.heldout.double(), 0.01)
    error = task.weight[:, rest].double() - solution.dequantize()[:, rest].double()
    pull = torch.linalg.solve(metric[kept][:, kept], metric[kept][:, rest] @ error.T).T
    expected = task.weight[:, kept].double() + pull
    torch.testing.assert_close(solution.kept_weight.double(), expected, rtol=2**-8, atol=1e-4)
    assert (pull.abs() > 0.01).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_kept_columns_mean_zero(symmetric):
    solution = solve(problem(grid=Grid(4, 16, symmetric)))
    without = solution.dequantize(with_kept=False)
    values = solution.codes.float()
    if not symmetric:
        values -= solution.zero_points.float().repeat_interleave(16, 1)[:, :40]
    assert (values[:, solution.kept_index] == 0).all()
    assert (without[:, solution.kept_index] == 0).all()
    torch.testing.assert_close(solution.dequantize()[:, solution.kept_index], solution.kept_weight.float())
    rest = torch.ones(40, dtype=torch.bool)
    rest[solution.kept_index] = False
    assert torch.equal(without[:, rest], solution.dequantize()[:, rest])


def test_the_columns_with_the_largest_scores_are_kept():
    """An input of large energy, off the span of the others, is found."""
    task = problem(keep=0.05)
    metric = task.hessian.clone()
    metric[7, 7] += 1e3 * metric.diagonal().mean()
    metric[23, 23] += 5e2 * metric.diagonal().mean()
    solution = solve(Problem(task.weight, metric, grid=task.grid, damping=0.001, keep=0.05))
    assert solution.kept_index.tolist() == [7, 23]
    assert solution.column_scores.topk(2).indices.sort().values.tolist() == [7, 23]


@pytest.mark.parametrize("static", [False, True])
def test_a_kept_outlier_does_not_coarsen_its_group(static):
    """The steps of a group are those of the weights that are on the grid."""
    torch.manual_seed(3)
    weight = torch.randn(6, 32)
    weight[:, 9] *= 1000
    metric = torch.eye(32)
    metric[9, 9] = 1e6
    task = Problem(weight, metric, grid=Grid(4, 32), damping=1e-6, keep=0.01, static_scales=static)
    solution = solve(task)
    assert solution.kept_index.tolist() == [9]
    assert solution.scales.float().abs().max() < 1.0
    error = (solution.dequantize() - weight).square()
    error[:, 9] = 0.0
    assert (error.sum(1) < 1.0).all()


def test_keeping_columns_lowers_the_error():
    """On the metric that is solved, more kept columns never cost."""
    errors = []
    for keep in (0.0, 0.05, 0.2, 0.5):
        task = problem(seed=4, keep=keep)
        values = solve(task).dequantize().double()
        errors.append(column_error(values - task.weight.double(), task.hessian.double()).sum().item())
    assert errors[3] < errors[2] < errors[1] < errors[0]


def test_keeping_nothing_is_babai_with_scores():
    task = problem(keep=0.0)
    plain, scored = METHODS["babai"](task), solve(task)
    assert torch.equal(plain.codes, scored.codes)
    assert scored.kept_index.numel() == 0
    assert scored.column_scores.shape == (40,)


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 300), share=st.floats(1e-6, 0.5))
def test_share_of_kept_columns(columns, share):
    """Rounded up, at least one, never all; sorted; the largest scores."""
    scores = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    kept = kept_columns(scores, share)
    assert len(kept) == min(max(1, math.ceil(share * columns - 1e-9)), columns - 1)
    assert kept.tolist() == sorted(set(kept.tolist()))
    rest = [score for column, score in enumerate(scores) if column not in kept.tolist()]
    if len(kept):
        assert scores[kept].min() >= max(rest)

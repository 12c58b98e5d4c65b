"""The damping that is chosen without trial solves, against trial solves on fresh tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from geoquant.lattice.grid import Grid
from geoquant.methods import Problem
from geoquant.methods.babai import DAMPINGS, choose_damping, solve

NONE = torch.zeros(0, dtype=torch.int64)


def scene(tokens: int, columns: int, seed: int):
    """Moments of `tokens` inputs, of a seventh as many held-out ones, and the population metric."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns) / columns**0.5 + 0.3 * torch.eye(columns)
    mixing = mixing * torch.randn(columns).mul(0.7).exp()
    inputs = torch.randn(tokens, columns) @ mixing
    held = torch.randn(max(4, tokens // 7), columns) @ mixing
    problem = Problem(torch.randn(24, columns), inputs.T @ inputs, held.T @ held, grid=Grid(4, 16))
    return problem, mixing.T @ mixing


def population_errors(problem: Problem, truth: torch.Tensor) -> list[float]:
    """Error on the population of actually solving with each damping, on the tokens that are not held out."""
    errors = []
    for damping in DAMPINGS:
        solution = solve(dataclasses.replace(problem, heldout=None, damping=damping))
        difference = solution.dequantize() - problem.weight
        errors.append(((difference @ truth) * difference).sum().item())
    return errors


@pytest.mark.parametrize(("tokens", "regret"), [(40, 1.08), (90, 1.08), (400, 1.03)])
def test_choice_costs_little_against_hindsight(tokens, regret):
    """Population error of the chosen damping over that of the best one, averaged over random layers."""
    ratios, fixed = [], []
    for seed in range(8):
        problem, truth = scene(tokens, 64, seed)
        errors = population_errors(problem, truth)
        ratios.append(errors[DAMPINGS.index(choose_damping(problem, NONE))] / min(errors))
        fixed.append(errors[0] / min(errors))
    mean = sum(ratios) / len(ratios)
    assert mean < regret
    if tokens < 64:
        assert mean < sum(fixed) / len(fixed)


def test_fewer_tokens_more_damping():
    """With fewer tokens than columns the metric must be trusted less."""
    chosen = [
        sum(choose_damping(scene(tokens, 64, seed)[0], NONE) for seed in range(6)) / 6 for tokens in (16, 64, 4000)
    ]
    assert chosen[0] > chosen[1] > chosen[2]
    assert chosen[2] <= 0.01


def test_without_held_out_tokens_the_default():
    problem, _ = scene(100, 16, 0)
    assert choose_damping(dataclasses.replace(problem, heldout=None), NONE) == 0.01


def test_a_given_damping_is_used():
    problem, _ = scene(100, 16, 0)
    assert solve(dataclasses.replace(problem, damping=0.07)).damping == 0.07
    assert solve(dataclasses.replace(problem, damping=0.0)).damping == 0.0


def test_kept_columns_pay_nothing():
    """Only rounded columns count: with all but one kept, only that one is priced."""
    problem, _ = scene(40, 8, 1)
    kept = torch.arange(1, 8)
    price = []
    for damping in DAMPINGS:
        level = damping * problem.hessian.diagonal().mean()
        metric = problem.hessian.double() + level * torch.eye(8)
        pull = torch.linalg.solve(metric[1:, 1:], metric[1:, 0])
        left = torch.cat([torch.ones(1, dtype=torch.float64), -pull])
        price.append((left @ problem.heldout.double() @ left).item())
    assert choose_damping(problem, kept) == DAMPINGS[price.index(min(price))]

"""Noise in the metric of the inputs: its covariance and its cost in closed form, and noise inside the recursion."""

from __future__ import annotations

import pytest
import torch

from geoquant.lattice.basis import compensation_factor, damped, metric_factor
from geoquant.lattice.unboxed import unboxed_babai
from geoquant.privacy.shape import equal_deviation, isotropic_noise, metric_noise

COLUMNS, DAMPING = 7, 0.05


def problem(seed: int):
    """Metric, a column order, and both factors."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.diag(torch.logspace(-1, 1, COLUMNS, dtype=torch.float64))
    inputs[:, 2] += inputs[:, 5]
    metric, order = inputs.T @ inputs / len(inputs), torch.randperm(COLUMNS, generator=generator)
    return metric, order, *(make(metric, order, DAMPING) for make in (compensation_factor, metric_factor))


def by_recursion(weight, factor, order, row_steps, column_steps, drawn):
    """Each column's centre gets noise of deviation `sigma U_jj`, in units of its row; errors are of centres without."""
    work, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.int64)
    for place, column in enumerate(order.tolist()):
        step = row_steps * column_steps[column]
        codes[:, column] = torch.round((work[:, column] + drawn[:, place] * factor[place, place]) / step).long()
        error = (work[:, column] - codes[:, column] * step) / factor[place, place]
        for later in range(place + 1, len(order)):
            work[:, order[later]] -= error * factor[place, later]
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_noise_inside_the_recursion_is_babai_on_noisy_weights_run_for_run(seed):
    _, order, factor, basis = problem(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(30, COLUMNS, generator=generator, dtype=torch.float64)
    rows, columns = (0.1 + torch.rand(n, generator=generator, dtype=torch.float64) for n in (30, COLUMNS))
    scales = 0.3 * rows
    drawn = scales[:, None] * torch.randn(
        30, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    expected = by_recursion(weight, factor, order, rows, columns, drawn)
    noise = metric_noise(scales, factor, order, torch.Generator().manual_seed(seed))
    found = unboxed_babai(weight + noise, basis, order, rows, columns)
    assert torch.equal(found.long(), expected)
    assert not torch.equal(unboxed_babai(weight, basis, order, rows, columns).long(), expected)


def test_its_covariance_is_the_inverse_of_the_damped_metric():
    metric, order, factor, _ = problem(0)
    inverse = torch.linalg.inv(damped(metric, DAMPING))
    count = 40_000
    noise = metric_noise(
        torch.full((count,), 2.0, dtype=torch.float64), factor, order, torch.Generator().manual_seed(1)
    )
    found = noise.T @ noise / count
    # Five standard errors of every entry: sd^2 = (C_ii C_jj + C_ij^2) / n.
    sizes = inverse.diagonal()
    error = 4 * ((sizes[:, None] * sizes + inverse.square()) / count).sqrt()
    assert ((found - 4 * inverse).abs() < 5 * error).all()


@pytest.mark.parametrize("seed", range(3))
def test_isotropic_noise_of_equal_deviation_costs_the_same(seed):
    metric, order, factor, _ = problem(seed)
    ratio = equal_deviation(metric, factor, order)
    inverse = torch.linalg.inv(damped(metric, DAMPING))
    assert ratio**2 * metric.trace() == pytest.approx((metric @ inverse).trace().item())
    scales, count = torch.full((20_000,), 0.5, dtype=torch.float64), 20_000
    made = (
        metric_noise(scales, factor, order, torch.Generator().manual_seed(2)),
        isotropic_noise(scales, COLUMNS, ratio, torch.Generator().manual_seed(3)),
    )
    cost = 0.25 * (metric @ inverse).trace().item()
    for noise in made:
        own = ((noise @ metric) * noise).sum(1)
        assert own.mean().item() == pytest.approx(cost, abs=5 * own.std().item() / count**0.5)
    # At the same cost, shaped noise is the larger one.
    assert made[0].square().sum() > 2 * made[1].square().sum()

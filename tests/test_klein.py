"""Randomised rounding: its distribution in one dimension, its law of errors, its limit."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from geoquant.lattice.basis import compensation_factor, damped, metric_factor
from geoquant.lattice.klein import discrete_gaussian, klein
from geoquant.lattice.order import column_order
from geoquant.lattice.unboxed import unboxed_babai
from oracles.lattice import column_error, random_metric


@pytest.mark.parametrize(("centre", "deviation"), [(0.0, 1.0), (0.3, 0.4), (-7.5, 2.5), (100.2, 0.15)])
def test_codes_follow_the_discrete_gaussian(centre, deviation):
    """Chi-square against the exact probabilities; one test in a thousand would fail by chance, the seed is fixed."""
    drawn = discrete_gaussian(
        torch.full((40000,), centre, dtype=torch.float64), deviation, torch.Generator().manual_seed(0)
    )
    values = torch.arange(round(centre) - 30, round(centre) + 31, dtype=torch.float64)
    weights = torch.exp(-(values - centre).square() / (2 * deviation**2))
    expected = 40000 * weights / weights.sum()
    often = expected >= 5
    counts = torch.stack([(drawn == value).sum() for value in values])[often].double()
    assert counts.sum() >= 40000 - 60
    wanted = expected[often] * counts.sum() / expected[often].sum()
    assert often.sum() == 1 or chisquare(counts.numpy(), wanted.numpy()).pvalue > 1e-3


def setting(columns=40, rows=3000, seed=0):
    metric = damped(random_metric(columns, seed), 0.01)
    order = column_order("activation", metric, columns)
    factor = compensation_factor(metric, order, 0.0)
    lengths = torch.empty(columns, dtype=torch.float64)
    lengths[order] = factor.diagonal().reciprocal()
    weight = 20 * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / lengths
    return metric, order, factor, lengths, weight


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_the_error_is_the_number_of_columns_times_sigma_squared(sigma):
    """Steps D/r_j make every r_j s_j one, so the law holds from half of it on: 3000 rows, within three per cent."""
    metric, order, factor, lengths, weight = setting()
    steps, one = lengths.reciprocal(), torch.ones(len(weight), dtype=torch.float64)
    codes = klein(weight, factor, order, one, steps, sigma, torch.Generator().manual_seed(2))
    error = column_error(weight - codes * steps, metric).mean().item()
    assert error == pytest.approx(len(lengths) * sigma**2, rel=0.03)


def test_the_law_does_not_ask_for_equal_lengths():
    """One step for all columns: as long as sigma is above half of the largest r_j s_j."""
    metric, order, factor, lengths, weight = setting(rows=1500)
    step = (1.0 / lengths.max()).expand(len(lengths))
    one = torch.ones(len(weight), dtype=torch.float64)
    codes = klein(weight, factor, order, one, step, 0.7, torch.Generator().manual_seed(3))
    error = column_error(weight - codes * step, metric).mean().item()
    assert error == pytest.approx(len(lengths) * 0.7**2, rel=0.03)


def test_without_noise_it_is_babai():
    metric, order, factor, lengths, weight = setting(rows=50)
    rows = torch.linspace(0.5, 2.0, 50, dtype=torch.float64)
    steps = lengths.reciprocal()
    found = klein(weight, factor, order, rows, steps, 0.0)
    expected = unboxed_babai(weight, metric_factor(metric, order, 0.0), order, rows, steps)
    torch.testing.assert_close(found, expected.to(torch.int32))


def test_a_seed_repeats_and_another_does_not():
    _, order, factor, lengths, weight = setting(rows=50)
    one = torch.ones(50, dtype=torch.float64)
    first, second, third = (
        klein(weight, factor, order, one, lengths.reciprocal(), 1.0, torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)

"""Triangular factors against dense inverses, and the price of rounding against simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import (
    NotPositiveDefinite,
    compensation_factor,
    damped,
    expected_error,
    heldout_prices,
    metric_factor,
    permuted,
    triangular_inverse,
)
from oracles.lattice import column_error, random_metric


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 200), seed=st.integers(0, 999), damping=st.sampled_from([0.001, 0.01, 0.3]))
def test_factor_is_a_root_of_the_inverse(columns, seed, damping):
    """`U^T U` is the inverse of the damped metric in processing order, U upper triangular with positive diagonal."""
    metric = random_metric(columns, seed)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    factor = compensation_factor(metric, order, damping)
    explicit = metric + damping * metric.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(explicit[order][:, order])
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-7, atol=1e-9 * inverse.abs().max().item())
    assert torch.equal(factor, torch.triu(factor))
    assert (factor.diagonal() > 0).all()


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 70), base=st.sampled_from([1, 2, 16, 128]), seed=st.integers(0, 999))
def test_triangular_inverse_equals_the_dense_one(size, base, seed):
    torch.manual_seed(seed)
    lower = torch.tril(torch.randn(size, size, dtype=torch.float64)) / size**0.5 + 2 * torch.eye(
        size, dtype=torch.float64
    )
    torch.testing.assert_close(triangular_inverse(lower, base), torch.linalg.inv(lower), rtol=1e-9, atol=1e-9)


def test_damping_adds_a_share_of_the_mean_energy():
    metric = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damped(metric, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(damped(metric, 0.0), metric)
    assert torch.equal(damped(torch.zeros(3, 3), 0.01), torch.eye(3))


@pytest.mark.parametrize(
    "metric",
    [
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]),
        torch.tensor([[torch.nan, 0.0], [0.0, 1.0]]),
        torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]),
        -torch.eye(2),
    ],
    ids=["indefinite", "nan", "nan on the diagonal", "inf", "negative"],
)
def test_a_metric_without_a_root_is_refused(metric):
    with pytest.raises(NotPositiveDefinite, match=r"metric of 2 columns is not positive definite at damping 0\.01"):
        compensation_factor(metric, torch.arange(2), 0.01)


@pytest.mark.parametrize("size", [1, 40, 200])
def test_the_basis_is_a_root_of_the_metric_and_the_inverse_of_the_other_factor(size):
    metric = random_metric(size, 2)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    basis, factor = metric_factor(metric, order, 0.02), compensation_factor(metric, order, 0.02)
    torch.testing.assert_close(basis, basis.triu(), rtol=0, atol=0)
    torch.testing.assert_close(basis @ basis.T, damped(metric, 0.02)[order][:, order])
    torch.testing.assert_close(basis @ factor, torch.eye(size, dtype=basis.dtype))


def test_a_rank_deficient_metric_is_factorised():
    """Fewer tokens than columns, in single precision: the damping carries it."""
    metric = random_metric(96, 0, rank=5).float()
    factor = compensation_factor(metric, torch.arange(96), 0.003)
    assert factor.isfinite().all()


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_the_factor_over_several_panels(size):
    """Sizes around and beyond a panel of 128 columns, against the inverse itself; a late pivot is still refused."""
    metric = random_metric(size, 1)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    factor = compensation_factor(metric, order, 0.01)
    inverse = torch.linalg.inv(damped(metric, 0.01)[order][:, order])
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-8, atol=1e-10 * inverse.abs().max().item())
    assert torch.equal(factor, factor.triu())
    broken = damped(metric, 0.01)
    broken[0, 0] = -1e6 * broken.diagonal().abs().max()  # the last pivot of this order
    with pytest.raises(NotPositiveDefinite):
        compensation_factor(broken, torch.arange(size), 0.0)


def test_expected_error_on_its_own_metric_is_the_squared_length():
    metric = random_metric(30, 3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    factor = compensation_factor(metric, order, 0.02)
    price = expected_error(factor, factor.diagonal(), damped(metric, 0.02)[order][:, order])
    torch.testing.assert_close(price, factor.diagonal().reciprocal().square())


def test_prices_of_some_rounded_columns():
    """In reversed order: free columns, which come first there, pay nothing; a stride samples the others."""
    metric, other = random_metric(20, 1), random_metric(20, 2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    factor = compensation_factor(metric, order, 0.02)
    every = expected_error(factor, factor.diagonal(), other[order][:, order]).flip(0)
    back = order.flip(0)
    reverse = (metric[back][:, back], other[back][:, back])
    prices, lengths = heldout_prices(*reverse, 0.02)
    torch.testing.assert_close(prices, every)
    torch.testing.assert_close(lengths, factor.diagonal().reciprocal().flip(0))
    torch.testing.assert_close(heldout_prices(*reverse, 0.02, free=7, stride=3)[0], every[7::3])
    with pytest.raises(NotPositiveDefinite):
        heldout_prices(-reverse[0], reverse[1], 0.02)


def test_permuting_a_symmetric_matrix():
    metric = random_metric(9, 0)
    metric = metric + metric.T  # not every processor's products of a matrix with itself are symmetric to the last bit
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted(metric, order), metric[order][:, order])


def test_expected_error_equals_simulated_rounding():
    """Independent rounding errors pushed through the update, one column at a time, measured on other tokens."""
    columns, draws = 12, 200_000
    metric, other = random_metric(columns, 1), random_metric(columns, 2)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    variance = torch.rand(columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    target = damped(metric, 0.05)
    generator = torch.Generator().manual_seed(3)
    noise = (torch.rand(draws, columns, generator=generator, dtype=torch.float64) - 0.5) * (12 * variance).sqrt()
    # `moved` is what the update rule has added to each column so far; `left` the final w - q.
    moved, left = torch.zeros_like(noise), torch.zeros_like(noise)
    for position in range(columns):
        column, rest = order[position], order[position + 1 :]
        left[:, column] = noise[:, position] - moved[:, column]
        if len(rest):
            pull = torch.linalg.solve(target[rest][:, rest], target[rest, column])
            # The minimiser over the free columns follows each new error in proportion.
            moved[:, rest] += noise[:, position, None] * pull
    simulated = column_error(left, other).mean().item()
    factor = compensation_factor(metric, order, 0.05)
    predicted = (expected_error(factor, factor.diagonal(), other[order][:, order]) * variance).sum().item()
    assert simulated == pytest.approx(predicted, rel=0.02)

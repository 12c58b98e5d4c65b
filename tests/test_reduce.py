"""What lattice reduction can and cannot do, each fact by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.order import column_order
from geoquant.lattice.reduce import headroom, lll
from oracles.lattice import random_metric


def basis_of(columns, seed, order=None):
    """`R` with `A = R^T R`; the last column is the first that Babai decides."""
    metric = damped(random_metric(columns, seed), 0.001)
    if order is not None:
        metric = metric[order][:, order]
    return torch.linalg.cholesky(metric).T


def nearest_plane(basis, target):
    """Babai's lattice point for each row of targets, last basis vector first."""
    rest, point = target.clone(), torch.zeros_like(target)
    for j in range(len(basis) - 1, -1, -1):
        code = torch.round(rest[:, j] / basis[j, j])
        rest -= code[:, None] * basis[:, j]
        point += code[:, None] * basis[:, j]
    return point


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 24), seed=st.integers(0, 999))
def test_lll_reduces(columns, seed):
    """A unimodular change of basis, the same Gram matrix, Lovasz' condition, size reduced."""
    basis = basis_of(columns, seed)
    reduced, transform, _ = lll(basis)
    whole = transform.double()
    assert abs(torch.linalg.det(whole)).item() == pytest.approx(1.0, abs=1e-6)
    gram = whole.T @ basis.T @ basis @ whole
    torch.testing.assert_close(reduced.T @ reduced, gram, rtol=1e-7, atol=1e-9 * gram.abs().max().item())
    torch.testing.assert_close(reduced, reduced.triu())
    diagonal = reduced.diagonal()
    for k in range(1, columns):
        assert reduced[k - 1, k] ** 2 + diagonal[k] ** 2 >= 0.99 * diagonal[k - 1] ** 2 * (1 - 1e-9)
        assert (reduced[:k, k].abs() <= 0.5 * diagonal[:k] * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(2, 24), seed=st.integers(0, 999))
def test_the_product_of_lengths_stays_and_the_sum_of_squares_falls_to_no_less_than_its_floor(columns, seed):
    basis = basis_of(columns, seed)
    reduced, _, swaps = lll(basis)
    before, after = basis.diagonal().abs(), reduced.diagonal().abs()
    assert after.log().sum().item() == pytest.approx(before.log().sum().item(), abs=1e-8)
    assert after.square().sum() <= before.square().sum() * (1 + 1e-12)
    floor = columns * before.square().log().mean().exp()
    assert after.square().sum() >= floor * (1 - 1e-9)
    assert 1 - after.square().sum() / before.square().sum() <= headroom(before) + 1e-9
    if swaps == 0:
        torch.testing.assert_close(after, before)


def test_every_swap_lowers_the_sum():
    """Lovasz' condition broken: the pair after the swap has the same product and lies between."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        first, second, above = torch.rand(3, generator=generator, dtype=torch.float64) + 0.01
        above = (above - 0.5) * first
        if above**2 + second**2 >= first**2:
            continue
        new = (above**2 + second**2).sqrt()
        other = first * second / new
        assert new**2 + other**2 < first**2 + second**2
        assert max(new, other) <= first


def test_size_reduction_does_not_move_babai_s_point():
    """Any unit upper triangular integer change of basis keeps every plane."""
    basis = basis_of(12, 4)
    generator = torch.Generator().manual_seed(1)
    change = torch.randint(-3, 4, (12, 12), generator=generator).double().triu(1) + torch.eye(12, dtype=torch.float64)
    target = 5 * torch.randn(40, 12, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(nearest_plane(basis @ change, target), nearest_plane(basis, target))


def test_only_signed_permutations_map_a_box_of_codes_to_a_box():
    """All unimodular maps of the plane with entries up to two, on the box from -3 to 3."""
    box = set(itertools.product(range(-3, 4), repeat=2))
    keeping, moving = 0, 0
    for a, b, c, d in itertools.product(range(-2, 3), repeat=4):
        if abs(a * d - b * c) != 1:
            continue
        if {(a * x + b * y, c * x + d * y) for x, y in box} == box:
            assert sorted(map(abs, (a, b))) == sorted(map(abs, (c, d))) == [0, 1]
            keeping += 1
        else:
            moving += 1
    assert keeping == 8  # two orders, four choices of signs
    assert moving > 0


def test_steps_from_the_lengths_leave_no_headroom():
    metric = random_metric(30, 6)
    factor = compensation_factor(metric, column_order("activation", metric, 30), 0.01)
    lengths = factor.diagonal().reciprocal()
    assert headroom(lengths) > 0.05
    assert headroom(lengths * lengths.reciprocal()) == pytest.approx(0.0, abs=1e-12)


def test_after_the_sort_little_is_left():
    """Sorted by smallest pivot, Lovasz' condition holds before size reduction: fewer swaps than in natural order."""
    swaps = {}
    for name in ("natural", "min-pivot"):
        metric = damped(random_metric(40, 2), 0.001)
        order = column_order(name, metric, 40).flip(0)
        swaps[name] = lll(torch.linalg.cholesky(metric[order][:, order]).T)[2]
    assert swaps["min-pivot"] < 0.2 * swaps["natural"]

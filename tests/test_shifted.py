"""One target and one metric for two wishes: against the two wishes themselves, on every point and on all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import NotPositiveDefinite, compensation_factor
from geoquant.lattice.grid import Grid
from geoquant.lattice.kbest import kbest
from geoquant.methods import METHODS, Problem
from geoquant.privacy.shifted import combined, parts


def inputs(seed: int, columns: int, *counts: int) -> list[torch.Tensor]:
    """Tokens of several texts, float64, of unequal sizes in their columns."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return [torch.randn(count, columns, generator=generator, dtype=torch.float64) * sizes for count in counts]


def rows(seed: int, columns: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 10**6)
    return [torch.randn(count, columns, generator=generator, dtype=torch.float64) for _ in range(3)]


def wishes(q, weight, base, x, z, mu):
    """Both, token by token: how far the outputs of each row are from those wanted."""
    return ((q - weight) @ x.T).square().sum(1) + mu * ((q - base) @ z.T).square().sum(1)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 12), st.floats(1e-3, 1e3), st.integers(1, 12))
def test_the_two_wishes_and_the_one_differ_by_a_constant(seed, columns, private, mu, out):
    """For every point, though the private texts may leave directions without any input."""
    x, z = inputs(seed, columns, columns + 3, private)
    weight, base, q = rows(seed, columns, out)
    found = combined(weight, base, x.T @ x, z.T @ z, mu)
    for point in (q, weight, base, found.target, 100 * q):
        off = point - found.target
        one = ((off @ found.metric) * off).sum(1) + found.constant
        assert torch.allclose(one, wishes(point, weight, base, x, z, mu), rtol=1e-6, atol=1e-8)
    assert (found.constant >= 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_one_lattice_search_finds_the_best_of_all_points_for_both_wishes(seed):
    """The search keeps every prefix, so it is exact in its own metric; the truth is each of the 2^8 points, judged by
    what was wished."""
    mu = (0.2, 1.0, 7.0)[seed % 3]
    columns = 8
    x, z = inputs(seed, columns, 12, 5)
    weight, base, _ = rows(seed, columns)
    found = combined(weight, base, x.T @ x, z.T @ z, mu)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    steps = torch.full_like(weight, 1.1)
    limits = torch.full_like(weight, -1).int(), torch.zeros_like(weight).int()
    codes = kbest(found.target, compensation_factor(found.metric, order, 0.0), order, steps, 256, limits)
    points = torch.tensor(list(itertools.product((-1.0, 0.0), repeat=columns)), dtype=torch.float64) * 1.1
    for row in range(len(weight)):
        values = wishes(points, weight[row], base[row], x, z, mu)
        assert torch.allclose(codes[row].double() * 1.1, points[values.argmin()])
    away = kbest(weight, compensation_factor(x.T @ x, order, 0.0), order, steps, 256, limits)
    assert seed or not torch.equal(away, codes)  # the points of the one wish alone are others


def test_the_target_is_the_least_squares_fit_to_both():
    x, z = inputs(5, 7, 20, 4)
    weight, base, _ = rows(5, 7)
    found = combined(weight, base, x.T @ x, z.T @ z, 2.5).target
    wanted = np.concatenate([x @ weight.T, 2.5**0.5 * z @ base.T])
    truth = np.linalg.lstsq(np.concatenate([x, 2.5**0.5 * z]), wanted, rcond=None)[0].T
    assert np.allclose(found, truth, atol=1e-9)


@pytest.mark.parametrize("method", ["rtn", "babai", "lattice", "lattice-priced"])
def test_without_a_private_side_the_solution_is_the_plain_one_bit_for_bit(method):
    x, z = (one.float() for one in inputs(3, 16, 64, 30))
    weight, base, _ = (one.float() for one in rows(3, 16, 8))
    found = combined(weight, base, x.T @ x, z.T @ z, 0.0)
    assert torch.equal(found.target, weight)
    assert torch.equal(found.metric, x.T @ x)
    assert not found.constant.any()
    more = {"step": 0.1, "tokens": 64} if method.startswith("lattice") else {"grid": Grid(3, 8)}
    plain, ours = (METHODS[method](Problem(*given, **more)) for given in ((weight, x.T @ x), found[:2]))
    assert torch.equal(plain.codes, ours.codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_where_both_metrics_are_alike_the_target_is_between_the_two(seed, columns, mu, factor):
    (x,) = inputs(seed, columns, columns + 3)
    weight, base, _ = rows(seed, columns)
    share = mu * factor / (1 + mu * factor)
    found = combined(weight, base, x.T @ x, factor * x.T @ x, mu)
    assert torch.allclose(found.target, weight + share * (base - weight), atol=1e-7)


def test_what_private_text_does_not_use_stays_and_what_it_uses_alone_goes_back():
    function, private = torch.diag(torch.tensor([1.0, 0.0, 4.0])), torch.diag(torch.tensor([0.0, 2.0, 4.0]))
    weight, base = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[3.0, 3.0, 3.0]])
    found = combined(weight, base, function, private, 3.0)
    assert torch.allclose(found.target, torch.tensor([[1.0, 3.0, 2.5]]))
    assert torch.allclose(found.constant, torch.tensor([4 * 1.5**2 + 12 * 0.5**2]))


def test_more_rows_than_columns_and_fewer_are_the_same_problem():
    x, z = inputs(2, 5, 12, 3)
    weight, base, _ = rows(2, 5, 40)
    whole = combined(weight, base, x.T @ x, z.T @ z, 1.0)
    part = combined(weight[:2], base[:2], x.T @ x, z.T @ z, 1.0)
    assert torch.allclose(whole.target[:2], part.target)
    assert torch.allclose(whole.constant[:2], part.constant)


def test_what_cannot_be_combined_is_refused():
    eye, row = torch.eye(2), torch.ones(1, 2)
    nowhere = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(NotPositiveDefinite):
        combined(row, row, nowhere, nowhere, 1.0)
    with pytest.raises(NotPositiveDefinite):
        combined(row, row, eye, eye * torch.nan, 1.0)
    with pytest.raises(ValueError, match=r"shapes \(1, 2\), \(2, 2\), \(2, 2\), \(2, 2\)"):
        combined(row, eye, eye, eye)
    with pytest.raises(ValueError, match=r"shapes .*\(3, 3\)"):
        combined(row, row, eye, torch.eye(3))
    for mu in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="wanted at least 0 and finite"):
            combined(row, row, eye, eye, mu)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(0, 1))
def test_a_share_knows_no_units_and_keeps_the_trace(seed, unit, share):
    x, z = inputs(seed, 4, 9, 9)
    function, private = x.T @ x, z.T @ z
    first, second = parts(function, private, share)
    assert first == 1 - share
    assert (first * function + second * private).trace().item() == pytest.approx(function.trace().item())
    again = parts(function, unit * private, share)
    assert again[1] * unit == pytest.approx(second)
    weight, base, _ = rows(seed, 4)
    target = combined(weight, base, first * function, second * private).target
    if share == 1:
        assert torch.allclose(target, base)
    elif share:
        mu = share / (1 - share) * (function.trace() / private.trace()).item()
        assert torch.allclose(target, combined(weight, base, function, private, mu).target, atol=1e-5)


def test_a_metric_without_a_trace_has_no_share():
    eye = torch.eye(2)
    for other in (0 * eye, eye * torch.nan, eye * torch.inf):
        assert parts(eye, other, 0.5) is None
        assert parts(other, eye, 0.5) is None

"""Accumulated moments against explicit sums over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.observe.moments import CLIP, Accumulator, clipped_weights
from oracles.models import moments_by_hand


def accumulator(columns: int, dtype: torch.dtype = torch.float32) -> Accumulator:
    return Accumulator(columns, dtype=dtype, device=torch.device("cpu"))


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 30),
    batches=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=6),
    double=st.booleans(),
    seed=st.integers(0, 999),
)
def test_sums_are_those_of_explicit_outer_products(columns, batches, double, seed):
    """Any mixture of weighted, unweighted, held-out and empty batches."""
    torch.manual_seed(seed)
    sums = accumulator(columns, torch.float64 if double else torch.float32)
    expected = {held: torch.zeros(columns, columns, dtype=torch.float64) for held in (False, True)}
    counts = {False: 0, True: 0}
    for tokens, held, weighted in batches:
        x = torch.randn(tokens, columns)
        weights = torch.rand(tokens) * 3 if weighted else None
        sums.add(x, weights, held=held)
        expected[held] += moments_by_hand(x, weights)
        counts[held] += tokens
    if not any(counts.values()):
        return
    moments = sums.finish()
    assert (moments.tokens, moments.heldout_tokens) == (counts[False], counts[True])
    torch.testing.assert_close(moments.hessian.double(), expected[False], rtol=1e-4, atol=1e-4)
    assert moments.hessian.dtype == torch.float32
    if counts[True]:
        torch.testing.assert_close(moments.heldout.double(), expected[True], rtol=1e-4, atol=1e-4)
    else:
        assert moments.heldout is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_drift_is_that_of_explicit_tokens(weighted, held):
    """Only of tokens whose full-precision inputs are known; the moments do not change."""
    torch.manual_seed(0)
    x, exact, weights = torch.randn(9, 5), torch.randn(9, 5), torch.rand(9) if weighted else None
    sums = Accumulator(5, dtype=torch.float32, device=torch.device("cpu"), drift=True)
    for part, twins in ((slice(0, 4), exact[:4]), (slice(4, 6), None), (slice(6, 9), exact[6:])):
        sums.add(x[part], None if weights is None else weights[part], held=held, exact=twins)
    moments = sums.finish()
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for token in (0, 1, 2, 3, 6, 7, 8):
        scale = 1.0 if weights is None else weights[token].double()
        expected += scale * torch.outer((exact[token] - x[token]).double(), x[token].double())
    found, other = (moments.heldout_drift, moments.drift) if held else (moments.drift, moments.heldout_drift)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert other is None or not other.any()
    metric = moments.heldout if held else moments.hessian
    torch.testing.assert_close(metric.double(), moments_by_hand(x, weights), rtol=1e-4, atol=1e-4)


def test_without_a_reference_there_is_no_drift():
    sums = accumulator(3)
    sums.add(torch.randn(4, 3), None, held=False)
    assert sums.finish().drift is None


@pytest.mark.parametrize("columns", [1, 95, 96, 97, 193, 577, 600])
def test_tiles_cover_the_whole_matrix(columns):
    """More columns than a tile, not a multiple of it; both triangles, exactly symmetric."""
    torch.manual_seed(0)
    x, weights = torch.randn(12, columns), torch.rand(12)
    sums = accumulator(columns)
    sums.add(x[:7], weights[:7], held=False)
    sums.add(x[7:], weights[7:], held=False)
    found = sums.finish().hessian
    torch.testing.assert_close(found.double(), (x.double() * weights[:, None]).T @ x.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


def test_double_precision_keeps_small_tokens_beside_large_ones():
    """One massive token must not wash out the others."""
    small = torch.full((1000, 1), 1e-3)
    large = torch.full((1, 1), 1e3)
    found = {}
    for dtype in (torch.float32, torch.float64):
        sums = accumulator(1, dtype)
        sums.add(large, None, held=False)
        for row in small:
            sums.add(row[None], None, held=False)
        found[dtype] = sums.sums[False, False].item() - 1e6
    assert found[torch.float64] == pytest.approx(1e-3, rel=1e-3)
    assert found[torch.float32] == 0.0


def test_massive_tokens_are_described():
    """Largest over median energy, and the share of the top 0.1 per cent of tokens."""
    x = torch.ones(2000, 4)
    x[5] *= 100
    x[900] *= 10
    sums = accumulator(4)
    sums.add(x[:1500], torch.rand(1500), held=False)
    sums.add(x[1500:], None, held=True)
    massive = sums.finish().massive
    assert massive.largest == pytest.approx(10_000.0)
    assert massive.top_share == pytest.approx((10_000 + 100) / (10_000 + 100 + 1998))


def test_no_token_at_all():
    """An expert that is never reached: zeros, not a crash."""
    moments = accumulator(3).finish()
    assert not moments.hessian.any()
    assert moments.heldout is None
    assert (moments.tokens, moments.heldout_tokens, moments.massive.largest) == (0, 0, 0.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
def test_clipped_weights_cap_the_energy_of_a_token(energies):
    """Nobody counts for more than ten median tokens, nobody else is touched."""
    energy = torch.tensor(energies)
    weights = clipped_weights(energy)
    cap = CLIP * energy.median()
    torch.testing.assert_close(weights * energy, torch.minimum(energy, cap))
    assert (weights[energy <= cap] == 1).all()


def test_clipped_weights_where_most_tokens_have_no_input():
    energy = torch.tensor([0.0, 0.0, 0.0, 4.0, 6.0])
    assert clipped_weights(energy).tolist() == [1.0] * 5
    assert clipped_weights(torch.zeros(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("columns", [70, 700])
def test_a_massive_token_leaves_the_sums_positive_where_forward_passes_are_rounded(columns):
    """Sums are added up inside autocast, which would round products to bfloat16: with one token that is most of the
    energy, their error would drown all the others' directions."""
    generator = torch.Generator().manual_seed(0)
    sums = Accumulator(columns, dtype=torch.float32, device=torch.device("cpu"), compute=torch.bfloat16, drift=True)
    expected = {name: torch.zeros(columns, columns, dtype=torch.float64) for name in ("metric", "drift")}
    for batch in range(3):
        x = torch.randn(900, columns, generator=generator)
        if batch == 0:
            x[0] *= 1000
        twin = x + 0.1 * torch.randn(900, columns, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            sums.add(x, None, held=False, exact=twin)
        expected["metric"] += x.double().T @ x.double()
        expected["drift"] += (twin - x).double().T @ x.double()
    found = sums.finish()
    smallest = torch.linalg.eigvalsh(expected["metric"])[0].item()
    assert torch.linalg.eigvalsh(found.hessian.double())[0].item() > 0.8 * smallest > 0
    for name, matrix in (("metric", found.hessian), ("drift", found.drift)):
        assert (matrix.double() - expected[name]).norm() < 0.01 * expected[name].norm()


def test_double_sums_of_rounded_passes_are_exact():
    generator = torch.Generator().manual_seed(0)
    x, twin = (torch.randn(50, 20, generator=generator) for _ in range(2))
    sums = Accumulator(20, dtype=torch.float64, device=torch.device("cpu"), compute=torch.bfloat16, drift=True)
    sums.add(x, None, held=False, exact=twin)
    found = sums.finish()
    torch.testing.assert_close(found.hessian.double(), x.double().T @ x.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.drift.double(), (twin - x).double().T @ x.double(), rtol=1e-6, atol=1e-6)

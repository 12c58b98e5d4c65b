"""Lengths along a segment in metrics whose lengths are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from geoquant.geometry.riemann import fisher_rao, logit_kl, segment_length
from test_tangent import generator


def test_a_constant_metric_has_straight_lengths():
    found = segment_length(lambda t: 9.0)
    assert found.local == found.length == pytest.approx(3)
    assert found.correction == pytest.approx(0)
    assert segment_length(lambda t: 0.0).correction == 0


@pytest.mark.parametrize("end", [0.5, 1.5, 3.0])
def test_upwards_in_the_half_plane_a_segment_is_a_geodesic(end):
    """M(x, y) = I / y^2: from (0, 1) to (0, end) the distance is |ln end|."""
    found = segment_length(lambda t: (end - 1) ** 2 / (1 + t * (end - 1)) ** 2)
    assert found.length == pytest.approx(abs(math.log(end)), rel=1e-4)
    assert found.local == pytest.approx(abs(end - 1))


def test_the_correction_is_of_third_order():
    """Length over local length is 1 - delta / 2 + O(delta^2) there."""
    for delta in (1e-2, 1e-3):
        found = segment_length(lambda t, delta=delta: delta**2 / (1 + t * delta) ** 2)
        assert found.correction == pytest.approx(-delta / 2, rel=delta)


@pytest.mark.parametrize("energy", [-1.0, math.nan, math.inf])
def test_what_is_no_metric_is_refused(energy):
    with pytest.raises(ValueError, match="no energy below zero"):
        segment_length(lambda t: energy)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(2, 50), spread=st.floats(0.1, 10))
def test_distances_of_predictions_are_their_formulas(seed, classes, spread):
    one, other, third = (
        spread * torch.randn(3, classes, generator=generator(seed + place)).double() for place in range(3)
    )
    p, q = (softmax(logits.numpy(), axis=1) for logits in (one, other))
    for row in range(3):
        angle = 2 * math.acos(min(1.0, sum(math.sqrt(a * b) for a, b in zip(p[row], q[row], strict=True))))
        assert fisher_rao(one, other)[row].item() == pytest.approx(angle, rel=1e-6, abs=1e-7)
        assert logit_kl(one, other)[row].item() == pytest.approx(rel_entr(p[row], q[row]).sum(), rel=1e-9, abs=1e-12)
    assert (fisher_rao(one, other) <= fisher_rao(one, third) + fisher_rao(third, other) + 1e-12).all()
    torch.testing.assert_close(fisher_rao(one + 5, other), fisher_rao(other, one))


def test_of_two_classes_it_is_the_length_of_the_segment_in_the_fisher_metric():
    p, q = 0.2, 0.7
    logits = [torch.tensor([math.log(share), math.log(1 - share)]) for share in (p, q)]

    def energy(t):
        here = p + t * (q - p)
        return (q - p) ** 2 / (here * (1 - here))

    assert fisher_rao(*logits).item() == pytest.approx(segment_length(energy, nodes=20).length, rel=1e-6)


def test_to_second_order_its_square_is_twice_the_divergence_and_nothing_is_lost_near_zero():
    logits, step = (torch.randn(40, generator=generator(seed), dtype=torch.float64) for seed in (3, 4))
    for size in (1e-2, 1e-4):
        kl = logit_kl(logits, logits + size * step).item()
        assert fisher_rao(logits, logits + size * step).item() ** 2 == pytest.approx(2 * kl, rel=10 * size)
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert fisher_rao(*apart).item() == pytest.approx(math.pi)
    assert logit_kl(*apart).item() == math.inf
    assert logit_kl(apart[0], apart[0]).item() == fisher_rao(apart[0], apart[0]).item() == 0

"""Lengths along a segment in metrics whose lengths are known."""

from __future__ import annotations

import math

import pytest

from geoquant.geometry.riemann import segment_length


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

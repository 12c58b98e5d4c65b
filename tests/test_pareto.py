"""The Pareto set against its definition by hand, with and without noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.plan.pareto import beats, undominated

small = st.integers(0, 4).map(float)


@st.composite
def clouds(draw):
    """Points with few distinct values, so that ties are common, and a symmetric noise."""
    points, axes = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    values = np.array(draw(st.lists(st.lists(small, min_size=axes, max_size=axes), min_size=points, max_size=points)))
    flat = draw(st.lists(small, min_size=axes * points**2, max_size=axes * points**2))
    noise = np.array(flat).reshape(axes, points, points) / 2
    return values, np.maximum(noise, noise.transpose(0, 2, 1))


def by_hand(values, noise) -> list[bool]:
    """From the definition, with paths searched one by one."""
    points, axes = values.shape

    def wins(i, j):
        better = [values[j, k] - values[i, k] > noise[k, i, j] for k in range(axes)]
        worse = [values[i, k] - values[j, k] > noise[k, i, j] for k in range(axes)]
        return any(better) and not any(worse)

    def leads(i, j, seen=()):
        return wins(i, j) or any(wins(i, k) and leads(k, j, (*seen, i)) for k in range(points) if k not in (*seen, i))

    return [not any(wins(i, j) and not leads(j, i) for i in range(points)) for j in range(points)]


@settings(max_examples=200, deadline=None)
@given(clouds())
def test_it_is_the_definition(cloud):
    assert undominated(*cloud).tolist() == by_hand(*cloud)


@settings(max_examples=200, deadline=None)
@given(clouds())
def test_without_noise_it_is_the_set_of_pareto(cloud):
    values, noise = cloud
    wanted = [not any((b <= a).all() and (b < a).any() for b in values) for a in values]
    assert undominated(values, np.zeros_like(noise)).tolist() == wanted


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_something_is_always_left(cloud):
    assert undominated(*cloud).any()


def test_a_difference_within_its_noise_puts_nobody_out():
    values = np.array([[3.0, 0.10], [3.0, 0.30]])
    noise = np.zeros((2, 2, 2))
    assert undominated(values, noise).tolist() == [True, False]
    noise[1] = 0.25
    assert undominated(values, noise).tolist() == [True, True]


def test_being_a_little_worse_within_the_noise_saves_nobody():
    """Much less leakage at a loss that is higher by less than can be told."""
    values, noise = np.array([[1.001, 0.1], [1.0, 0.4]]), np.zeros((2, 2, 2))
    assert undominated(values, noise).tolist() == [True, True]
    noise[0] = 0.01
    assert undominated(values, noise).tolist() == [True, False]


def test_a_ring_stays_whole():
    values = np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 0.5], [0.5, 1.0, 0.0]])
    noise = np.full((3, 3, 3), 0.75)
    assert beats(values, noise).sum() == 3
    assert undominated(values, noise).all()
    # A point that beats one of them, and that nobody beats, puts out the whole ring.
    more = np.vstack([values, [0.0, -0.5, 0.3]])
    assert undominated(more, np.full((3, 4, 4), 0.75)).tolist() == [False, False, False, True]


def test_what_was_not_measured_beats_nothing_and_is_not_beaten():
    values = np.array([[3.0, np.nan], [4.0, 0.2], [5.0, np.nan]])
    assert undominated(values, np.zeros((2, 3, 3))).tolist() == [True, True, False]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_points_does_not_matter(order):
    values, noise = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 2.0]]), np.full((2, 3, 3), 0.4)
    assert undominated(values[list(order)], noise).tolist() == [index != 2 for index in order]

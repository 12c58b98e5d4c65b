"""Dominance by its definition counted by hand, and a family's line against every mixture of its points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.plan.dominance import BASELINES, LEVERS, at_level, line, versus
from geoquant.plan.pareto import beats
from geoquant.plan.points import FAMILIES

small = st.integers(0, 4).map(float) | st.just(float("nan"))


@st.composite
def clouds(draw):
    """Points with few distinct values, some not measured, and a symmetric noise."""
    points, measures = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    row = st.lists(small, min_size=measures, max_size=measures)
    values = np.array(draw(st.lists(row, min_size=points, max_size=points)))
    flat = draw(st.lists(st.integers(0, 4), min_size=measures * points**2, max_size=measures * points**2))
    noise = np.array(flat, float).reshape(measures, points, points) / 2
    return values, np.maximum(noise, noise.transpose(0, 2, 1)), [f"m{place}" for place in range(measures)]


def by_hand(values, noise, names, i, j) -> tuple[set, set, set]:
    better, worse, missing = set(), set(), set()
    for place, name in enumerate(names):
        a, b = values[i][place], values[j][place]
        if (a != a) != (b != b):
            missing.add(name)
        elif a == a and b - a > noise[place][i][j]:
            better.add(name)
        elif a == a and a - b > noise[place][i][j]:
            worse.add(name)
    return better, worse, missing


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_it_is_the_definition_and_that_of_the_pareto_set(cloud):
    wins = beats(*cloud[:2])
    for i in range(len(wins)):
        for j in range(len(wins)):
            found, (better, worse, missing) = versus(*cloud, i, j), by_hand(*cloud, i, j)
            assert (set(found.better), set(found.worse), set(found.missing)) == (better, worse, missing)
            assert found.dominates == wins[i, j] == (bool(better) and not worse and not missing)
            assert found.dominated == wins[j, i]


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_of_two_points_at_most_one_dominates(cloud):
    for i in range(len(cloud[0])):
        assert not versus(*cloud, i, i).dominates
        for j in range(i):
            one, other = versus(*cloud, i, j), versus(*cloud, j, i)
            assert not (one.dominates and other.dominates)
            assert (one.better, one.worse, one.missing) == (other.worse, other.better, other.missing)
            assert one.dominates == other.dominated


# ---- the line of a family

families = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8)


def columns(points) -> tuple[np.ndarray, np.ndarray]:
    leakage, loss = np.array(points, float).reshape(-1, 2).T
    return leakage, loss


@settings(max_examples=100, deadline=None)
@given(families)
def test_the_line_holds_what_nothing_undercuts(points):
    found = [points[index] for index in line(*columns(points))]
    wanted = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(found) == wanted
    assert found == sorted(wanted)


@settings(max_examples=100, deadline=None)
@given(families, st.floats(-1, 10))
def test_a_level_is_read_off_the_line_as_numpy_does(points, level):
    leakage, loss = columns(points)
    mixed = at_level(leakage, loss, level)
    if not len(points) or level < leakage.min():
        assert mixed is None
        return
    steps = list(line(leakage, loss))
    cost = float(mixed.of(loss))
    assert cost == pytest.approx(np.interp(level, leakage[steps], loss[steps]))
    assert float(mixed.of(leakage)) <= level + 1e-9
    assert cost <= loss[leakage <= level].min() + 1e-9  # never dearer than a point that was measured
    assert cost >= loss.min()
    more = at_level(leakage, loss, level + 0.5)
    assert float(more.of(loss)) <= cost + 1e-9  # more leakage never costs more


def test_a_mixture_mixes_what_it_is_given():
    mixed = at_level(np.array([0.4, 0.0]), np.array([1.0, 3.0]), 0.1)
    assert (mixed.first, mixed.second) == (1, 0)
    assert mixed.share == pytest.approx(0.25)
    assert mixed.of([[1.0, 2.0], [5.0, 10.0]]) == pytest.approx([4.0, 8.0])


def test_points_without_a_number_are_no_part_of_the_line():
    leakage, loss = np.array([np.nan, 0.1, 0.3]), np.array([0.0, np.nan, 1.0])
    assert line(leakage, loss) == (2,)
    assert at_level(leakage, loss, 0.2) is None


def test_every_family_is_known_and_on_one_side():
    named = [family for members in BASELINES.values() for family in members]
    assert set(named) | set(LEVERS) | {"original", "dp"} == set(FAMILIES)
    assert len(set(named) | set(LEVERS)) == len(named) + len(LEVERS)

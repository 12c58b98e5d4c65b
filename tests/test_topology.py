"""Persistent homology: shapes of known Betti numbers, single linkage, matchings by brute force, changes that tear."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment

from geoquant.errors import UserError
from geoquant.geometry.topology import Diagrams, betti, diagram_distance, persistence, topology
from test_tangent import embedded, generator

try:
    import gudhi
except ModuleNotFoundError:
    gudhi = None

with_gudhi = pytest.mark.skipif(gudhi is None, reason="needs gudhi, extra `topology`")


def circle(n=60, seed=0):
    angles = 2 * torch.pi * (torch.arange(n) + 0.2 * torch.rand(n, generator=generator(seed))) / n
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def torus(n=13):
    """A grid on the flat torus in four dimensions: products of two circles, all points of length one."""
    one = circle(n) / 2**0.5
    return torch.cat([one.repeat_interleave(n, 0), one.repeat(n, 1)], dim=1)


def clusters(seed=0, n=30):
    points = 0.05 * torch.randn(2 * n, 5, generator=generator(seed))
    points[:n, 0] += 1
    points[n:, 1] += 1
    return points


@with_gudhi
@pytest.mark.parametrize(
    ("points", "scale", "expected"),
    [
        (circle(), 0.5, (1, 1)),
        (embedded(circle(), 30)[0], 1.0, (1, 1)),
        (torus(), 0.8, (1, 2)),
        (clusters(), 0.7, (2, 0)),
        (clusters(), 2.0, (1, 0)),
        (torch.cat([circle(), circle() + 5]), 0.5, (2, 2)),
    ],
    ids=["circle", "circle elsewhere", "torus", "two clusters", "one scale up", "two circles"],
)
def test_betti_numbers(points, scale, expected):
    assert betti(persistence(points), scale) == expected


@with_gudhi
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(2, 40), dimension=st.integers(1, 20))
def test_pieces_die_where_single_linkage_joins_them(seed, n, dimension):
    points = torch.randn(n, dimension, generator=generator(seed)).double()
    found = persistence(points).h0
    assert not found[:, 0].any()
    expected = linkage(points.numpy(), "single")[:, 2]
    np.testing.assert_allclose(np.sort(found[:, 1]), np.sort(expected), rtol=1e-12)


def matched(one, other, worst):
    """Distance of two small diagrams over all matchings: the diagonal is a partner for everyone."""
    n, m = len(one), len(other)
    cost = np.zeros((n + m, n + m))
    cost[:n, :m] = np.abs(one[:, None] - other[None]).max(2)
    cost[:n, m:] = (one[:, 1:] - one[:, :1]) / 2
    cost[n:, :m] = (other[:, 1] - other[:, 0]) / 2
    if not worst:
        return cost[linear_sum_assignment(cost)].sum()
    for level in np.unique(cost):
        banned = cost > level
        if not banned[linear_sum_assignment(banned.astype(float))].any():
            return level
    return 0.0  # nothing to match


@with_gudhi
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), a=st.integers(0, 5), b=st.integers(0, 5))
def test_distances_are_those_of_the_best_matching(seed, a, b):
    rng = np.random.default_rng(seed)

    def diagram(n):
        births = rng.random(n)
        return np.stack([births, births + rng.random(n) + 0.01], axis=1)

    pair = diagram(a), diagram(b)
    found = diagram_distance(*(Diagrams(each, np.empty((0, 2))) for each in pair))
    assert found.bottleneck[0] == pytest.approx(matched(*pair, worst=True), abs=1e-9)
    assert found.wasserstein[0] == pytest.approx(matched(*pair, worst=False), rel=0.011, abs=1e-9)
    assert found.bottleneck[1] == found.wasserstein[1] == 0


@with_gudhi
def test_a_small_move_moves_a_diagram_no_further_than_twice():
    points = torch.randn(80, 6, generator=generator(1)).double()
    step = torch.randn(80, 6, generator=generator(2)).double()
    step *= 0.01 / step.norm(dim=1, keepdim=True)
    found = diagram_distance(persistence(points), persistence(points + step))
    assert 0 < max(found.bottleneck) <= 0.02 + 1e-6


@with_gudhi
def test_a_change_that_opens_a_loop_is_seen_and_noise_is_not():
    """Points of a circle step aside and leave a gap, which a loop must wait for; noise as long only blurs them.

    Noise against noise: of 12 changes that are noise themselves each is the largest of four with probability 1/4, ten
    or more of them with probability below 1e-4.
    """
    _, basis = embedded(circle(200), 40)
    points = circle(200) @ basis.T
    angles = torch.atan2(*circle(200).unbind(1))
    aside = torch.where(angles.abs() < 0.5, angles.sign() * 0.5, angles)
    parted = torch.stack([aside.sin(), aside.cos()], dim=1) @ basis.T
    told = []
    found = topology(points, parted, generator(3), draws=3, shown=told.append)
    assert told == list(range(1, 9))
    assert found.rows == 100
    assert found.p("bottleneck", 1, "noise") == found.p("bottleneck", 1, "subsample") == 0.25
    assert found.after.h1[:, 0].min() > 0.9 > found.before.h1[:, 0].min()

    low = 0
    for seed in range(12):
        changed = points + 0.05 * torch.randn(200, 40, generator=generator(20 + seed))
        low += topology(points, changed, generator(seed), most=40, draws=3).p("wasserstein", 0, "noise") == 0.25
    assert low < 10


@with_gudhi
def test_length_alone_is_no_change_and_zero_rows_have_no_direction():
    points = torch.randn(60, 8, generator=generator(4))
    points[7] = 0
    scales = torch.rand(60, 1, generator=generator(5)) + 0.5
    found = topology(points, scales * points, generator(6), draws=1)
    assert found.rows == 29
    assert max(found.change.bottleneck) < 1e-6
    assert min(found.noise[0].bottleneck[0], found.subsample[0].bottleneck[0]) > 1e-3
    assert found.p("bottleneck", 0, "noise") == 1


def test_too_few_and_too_many():
    with pytest.raises(ValueError, match="2 to 400 points, but got 401"):
        persistence(torch.zeros(401, 2))
    with pytest.raises(ValueError, match="at least four rows that are not zero, but got 3"):
        topology(torch.eye(3), torch.eye(3), generator())


def test_without_the_package_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gudhi"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gudhi", None)
    with pytest.raises(UserError, match=r"persistent homology needs the package 'gudhi'; .*geoquant\[topology\]"):
        persistence(torch.eye(3))

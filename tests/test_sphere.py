"""The sphere bound against closed forms, against lattices searched by brute force, and its place in a site's gap."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.certificate import certificate, squared_steps
from geoquant.lattice.reduce import headroom, lll
from geoquant.lattice.rows import block_sizes, row_metric
from geoquant.lattice.sphere import BALL, CUBE_DB, POINTS, decibels, profile
from geoquant.methods.lattice import solve
from geoquant.methods.problem import Problem
from oracles.lattice import random_metric

NONE = torch.zeros(0, dtype=torch.int64)


def ball_moment(columns: int) -> float:
    """Second moment per dimension of a ball of volume one (Conway and Sloane, chapter 2, equation 85)."""
    return math.exp(2 / columns * math.lgamma(columns / 2 + 1)) / ((columns + 2) * math.pi)


def limits_of(squares):
    """`(gap, headroom, rows)` in dB of a made-up site with these squares."""
    site = torch.ones(1, 1)
    found = certificate(site, site, site, None, squares, 0.0)
    return found.gap_db, found.headroom_db, found.rows_db


def test_the_bound_is_the_limit_of_the_ball_and_never_above_it():
    moments = [ball_moment(columns) for columns in range(1, 5000)]
    assert moments[0] == pytest.approx(1 / 12)
    assert moments[1] == pytest.approx(1 / (4 * math.pi))
    assert all(after < before for before, after in itertools.pairwise(moments))
    assert moments[-1] > BALL
    # What is given away by taking the limit: little at the width of the smallest language models.
    assert decibels(ball_moment(576), BALL) < 0.05
    assert abs(CUBE_DB - 1.5329) < 5e-5


def test_equal_lengths_leave_the_cube_s_gap_and_no_headroom():
    squares = squared_steps(torch.tensor([[0.5], [3.0]]), torch.full((7,), 0.25), NONE, 7)
    assert limits_of(squares) == pytest.approx((CUBE_DB, 0.0, 0.0), abs=1e-9)
    assert squares.floor == pytest.approx(7 * (0.125**2 + 0.75**2))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    group=st.integers(1, 13),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_the_gap_is_the_cube_s_and_the_headroom_and_never_less(rows, columns, group, data, seed):
    """Against the definition in loops: groups of any size, steps of both signs, some columns kept."""
    generator = torch.Generator().manual_seed(seed)
    kept = data.draw(st.lists(st.integers(0, columns - 1), unique=True, max_size=columns - 1))
    scales = 10 ** torch.randn(rows, -(-columns // group), generator=generator, dtype=torch.float64)
    scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
    lengths = 10 ** torch.randn(columns, generator=generator, dtype=torch.float64)
    squares = squared_steps(scales, lengths, torch.tensor(sorted(kept), dtype=torch.int64), group)
    rounded = [j for j in range(columns) if j not in kept]
    floor = sum(
        len(rounded)
        * math.prod(abs(float(lengths[j]) * float(scales[i, j // group])) for j in rounded) ** (2 / len(rounded))
        for i in range(rows)
    )
    assert squares.floor == pytest.approx(floor, rel=1e-9)
    gap, room, taken = limits_of(squares)
    assert gap >= CUBE_DB - 1e-9
    assert gap == pytest.approx(CUBE_DB + room, abs=1e-9)
    assert room == pytest.approx(10 * math.log10(squares.planes / floor), abs=1e-9)
    assert taken == 0


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(2, 16), seed=st.integers(0, 99))
def test_headroom_is_that_of_reduce_and_no_basis_gets_below_the_floor(columns, seed):
    basis = torch.linalg.cholesky(damped(random_metric(columns, seed), 0.001)).T
    before, after = (r.diagonal().abs() for r in (basis, lll(basis)[0]))
    one = torch.ones(1, 1, dtype=torch.float64)
    squares, reduced = (squared_steps(one, lengths, NONE, columns) for lengths in (before, after))
    assert reduced.floor == pytest.approx(squares.floor, rel=1e-9)
    assert reduced.planes >= squares.floor * (1 - 1e-9)
    room = limits_of(squares)[1]
    assert 1 - 10 ** (-room / 10) == pytest.approx(headroom(before), abs=1e-9)


def test_kept_columns_are_no_dimensions_of_the_lattice():
    """What they absorb is gone: the density is that of the Schur complement."""
    metric, kept = random_metric(9, 3), torch.tensor([1, 4])
    order = torch.tensor([j for j in range(9) if j not in kept] + kept.tolist())
    lengths = torch.empty(9, dtype=torch.float64)
    lengths[order] = compensation_factor(metric, order, 0.0).diagonal().reciprocal()
    squares = squared_steps(torch.full((1, 1), 0.5), lengths, kept, 9)
    determinant = torch.det(metric) / torch.det(metric[kept][:, kept])
    assert squares.floor == pytest.approx(7 * 0.25 * determinant.item() ** (1 / 7), rel=1e-6)
    everything = squared_steps(torch.full((1, 1), 0.5), lengths, torch.arange(9), 9)
    assert (everything.floor, everything.planes) == (0, 0)
    assert limits_of(everything) == (None, None, None)


HEXAGON = [[1.0, 0.5], [0.0, math.sqrt(0.75)]]
SKEW = [[1.0, 0.3, -0.2], [0.0, 0.5, 0.1], [0.0, 0.0, 2.0]]


@pytest.mark.parametrize("rows", [HEXAGON, SKEW])
def test_errors_over_a_cell_lie_where_they_are_promised(rows):
    """Targets all over the fundamental cell: the nearest plane has the expected error; the closest point, found among
    all points around, has less, but not less than a ball of the cell's volume, and that is above the sphere bound."""
    basis = torch.tensor(rows, dtype=torch.float64)
    columns = len(basis)
    target = torch.rand(40000, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64) @ basis.T
    rest = target.clone()
    for j in range(columns - 1, -1, -1):
        rest -= torch.round(rest[:, j] / basis[j, j])[:, None] * basis[:, j]
    plane = rest.square().sum(1).mean().item()
    around = torch.tensor(list(itertools.product(range(-3, 4), repeat=columns)), dtype=torch.float64) @ basis.T
    closest = torch.stack([(part[:, None] - around).square().sum(2).amin(1).mean() for part in rest.split(2000)])
    closest = closest.mean().item()
    squares = squared_steps(torch.ones(1, 1), basis.diagonal(), NONE, columns)
    ball = columns * ball_moment(columns) * basis.diagonal().prod().item() ** (2 / columns)
    assert plane == pytest.approx(squares.expected / 12, rel=0.01)
    assert BALL * squares.floor < ball < closest < plane
    if rows is HEXAGON:  # the best lattice of the plane: 5 / (36 sqrt 3) per dimension
        assert closest == pytest.approx(2 * 5 / (36 * math.sqrt(3)) * math.sqrt(0.75), rel=0.01)


@pytest.mark.parametrize("coupled", [False, True])
def test_the_unbounded_lattice_has_no_headroom_and_says_what_rows_take_over(coupled):
    """Steps are powers of 2^(1/8), at most a sixteenth of an octave off: that is all that is left."""
    metric, generator = random_metric(24, 8).float(), torch.Generator().manual_seed(2)
    weight = torch.randn(10, 24, generator=generator)
    sizes = block_sizes([10], 4)
    g = torch.zeros(3, 4, 4)
    for block, size in enumerate(sizes):
        g[block, :size, :size] = random_metric(size, block, decades=0.5)
    rows = row_metric(g, sizes, floor=0.05, keep=1.0) if coupled else None
    found = solve(Problem(weight, metric, order="activation", damping=0.01, step=0.02, rows=rows))
    squares = found.squares
    steps = torch.exp2(found.row_exponents.double() / 8)[:, None] * torch.exp2(found.column_exponents.double() / 8)
    product = (steps * found.gram_schmidt.double()).log().sum(1)
    assert squares.floor == pytest.approx((24 * (2 / 24 * product).exp()).sum().item(), rel=0.01)
    gap, room, taken = limits_of(squares)
    assert 0 <= room < 0.03
    assert gap == pytest.approx(CUBE_DB + room + taken, abs=1e-9)
    if coupled:
        assert taken > 0.05
        assert squares.expected == pytest.approx(squares.planes * 10 ** (taken / 10))
    else:
        assert taken == pytest.approx(0.0, abs=1e-6)
    # The parts of stacked sites add up.
    parts = [found.rows(0, 3).squares, found.rows(3, 10).squares]
    for name in ("planes", "floor", "expected", "worst"):
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(squares, name))


def test_a_profile_is_the_sorted_lengths_around_their_geometric_mean():
    lengths = 10 ** (torch.arange(POINTS).double() / 10)  # 2 dB from one to the next
    shuffled = lengths[torch.randperm(POINTS, generator=torch.Generator().manual_seed(0))]
    expected = [16.0 - 2 * place for place in range(POINTS)]
    assert profile(shuffled) == pytest.approx(expected)
    assert profile(1e-9 * shuffled) == pytest.approx(expected)
    assert profile(torch.full((5,), 3.0)) == [0.0] * POINTS
    assert profile(torch.zeros(0)) is None
    assert profile(torch.tensor([1.0, 0.0])) is None
    assert profile(torch.tensor([1.0, math.nan])) is None
    assert len(json.dumps({"lengths": expected, "steps": expected}, indent=1)) < 400


def test_no_gap_where_there_is_no_density():
    squares = squared_steps(torch.ones(2, 1), torch.tensor([1.0, 0.0]), NONE, 2)
    assert squares.floor == 0
    assert limits_of(squares)[:2] == (None, None)
    assert decibels(math.inf, 1.0) is None
    assert decibels(math.nan, 1.0) is None

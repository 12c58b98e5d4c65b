"""The integer noise of guarantees: its table and odds against high precision, its law, its slack."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy.stats import chi2, kstest

from geoquant.errors import UserError
from geoquant.privacy.guarantee import noise
from geoquant.privacy.guarantee.gaussian import gaussian_epsilon, gaussian_mu
from geoquant.privacy.guarantee.noise import Slack, drawn, epsilon_with, on_lattice, released, sigma_for

SIGMA = 2.0**32


def seeded(count: int, seed: int = 0) -> np.ndarray:
    """The same draws from a generator that can be repeated: a test that fails must fail again."""
    return noise._drawn(count, np.random.default_rng(seed).bytes)


def test_the_table_is_right_to_the_last_of_128_bits():
    whole, tops = noise._table()
    assert len(whole) == 4095
    with mpmath.workdps(70):
        for cell in (1, 2, 3, 77, 256, 1000, 2047, 3333, 4095):
            truth = int(mpmath.erf(mpmath.mpf(cell) / 256 / mpmath.sqrt(2)) * 2**128)
            assert abs(whole[cell - 1] - truth) <= 1
        outside = 2**128 - whole[-1]
        assert outside / 2**128 < 2e-38  # what lies beyond 16 sigma is less than the table can hold
    assert whole == sorted(whole)
    assert [int(top) for top in tops] == [entry >> 96 for entry in whole]


def test_draws_are_gaussian_and_as_symmetric():
    x = (seeded(400_000) + 0.5) / SIGMA
    assert kstest(x, "norm").pvalue > 1e-4
    assert kstest(-x, x[:200_000]).pvalue > 1e-4
    # Far out too: of 400,000 about 540 lie beyond 3.2 sigma.
    far = int((np.abs(x) > 3.2).sum())
    assert abs(far - 549.7) < 5 * math.sqrt(549.7)


def test_noise_of_the_system_is_fresh_on_every_call():
    one, other = drawn((700, 500)), drawn((700, 500))
    assert one.shape == (700, 500)
    assert (one == other).mean() < 1e-3
    assert abs((one / SIGMA).std() - 1) < 0.01
    assert len(np.unique(one)) > 349_000  # more than one chunk, and none drawn twice


def test_every_bit_of_a_draw_is_used():
    """Places inside a cell are all alike but for the slope of the density: low bits must be fair, at 4.5 deviations."""
    x = seeded(200_000)
    for bit in range(14):
        ones = int(((x >> bit) & 1).sum())
        assert abs(ones - 1e5) < 4.5 * math.sqrt(5e4)
    assert len(np.unique(x)) > 199_000


def test_inside_a_cell_the_density_falls_as_it_should():
    """At 15 sigma it falls by 6% from edge to edge: in sixteenths of the cell, by their odds."""
    seed = np.random.default_rng(0)
    cells = np.full(400_000, 3840)
    original = noise._cells
    try:
        noise._cells = lambda count, source: cells[:count]
        found = noise._drawn(len(cells), seed.bytes)
    finally:
        noise._cells = original
    size = np.where(found < 0, ~found, found)
    assert (size >> 24 == 3840).all()
    places = (size & ((1 << 24) - 1)) >> 20  # sixteenths
    edges = 15 + np.arange(17) / 16 / 256
    mass = np.array([float(mpmath.ncdf(-a) - mpmath.ncdf(-b)) for a, b in pairwise(edges)])
    expected = mass / mass.sum() * len(size)
    seen = np.bincount(places, minlength=16)
    assert ((seen - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, 15)
    flat = len(size) / 16
    assert ((seen - flat) ** 2 / flat).sum() > chi2.ppf(1 - 1e-6, 15)  # and uniform places would have been noticed
    assert abs((found < 0).mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(found))


def test_a_tie_of_the_first_bits_is_settled_by_further_ones():
    whole, _ = noise._table()
    entry = 700  # the boundary itself, one below it, and one above, in all 128 bits
    asked = [whole[entry] - 1, whole[entry], whole[entry] + 1]
    high = b"".join((value >> 96).to_bytes(4, "little") for value in asked)
    low = [(value & ((1 << 96) - 1)).to_bytes(12, "little") for value in asked]
    chunks = iter([high, *low])
    cells = noise._cells(3, lambda count: next(chunks))
    assert cells.tolist() == [bisect_right(whole, value) for value in asked] == [entry, entry + 1, entry + 1]
    # The same of the comparison inside a cell: 39 bits, then 64.
    threshold = np.array([0.75 + 2.0**-45] * 2)
    first = np.full(2, int(0.75 * 2**39), np.uint64)
    further = iter([(2**64 // 64 - 1).to_bytes(8, "little"), (2**64 // 64).to_bytes(8, "little")])
    assert noise._below(first, threshold, lambda count: next(further)).tolist() == [True, False]


def test_signs_mirror_the_floor():
    """floor(-y) is -1 - floor(y): zero is no more likely than its neighbours, though both signs reach its cell."""
    places = np.array([0, 0, 5, 5], np.uint64)
    words = places | np.array([0, 1, 0, 1], np.uint64) << np.uint64(24)  # the uniform is zero: all are kept
    answers = iter([np.zeros(4, np.uint32).tobytes(), words.tobytes()])
    assert noise._drawn(4, lambda count: next(answers)).tolist() == [0, -1, 5, -6]


def test_acceptance_is_the_density_of_its_place_as_closely_as_stated():
    """The error of exp and of its argument, against 60 digits: below 2^-50, which is what the slack pays for."""
    rng = np.random.default_rng(1)
    cell, place = rng.integers(0, 4096, 300), rng.integers(0, 1 << 24, 300)
    away = (place + 0.5) * 2.0**-32
    keep = np.exp(-away * (cell * 2.0**-8 + away / 2))
    with mpmath.workdps(100):
        for c, j, found in zip(cell.tolist(), place.tolist(), keep):
            left, step = mpmath.mpf(c) / 256, mpmath.mpf(2) ** -32
            a = left + j * step
            mass = (mpmath.ncdf(-a) - mpmath.ncdf(-a - step)) / step
            assert abs(mpmath.mpf(float(found)) / (mass / mpmath.npdf(left)) - 1) < 2.0**-50


def test_released_integers_do_not_depend_on_floats_below_the_lattice():
    """The attack on floating-point noise reads the last bits of a sum. Here they carry nothing: the same n, the same
    law, and a released number is one function of one integer."""
    sigma = 0.37
    step = sigma / 2**32
    values = 0.1 + step * np.array([0.0, 0.2, -0.2])
    n = on_lattice(values, sigma)
    assert len(np.unique(n)) == 1 or np.abs(np.diff(n)).max() <= 1
    out = released(n + 12345, sigma)
    assert np.allclose(out, values + 12345.5 * step, atol=1.6 * step)


def test_rounding_moves_neighbours_apart_by_less_than_stated():
    rng = np.random.default_rng(2)
    for sigma, size in ((1e-3, 50.0), (0.3, 1e-6), (7.0, 1e5)):
        one, other = rng.normal(size=(2, 500)) * size
        apart = np.linalg.norm((on_lattice(one, sigma) - on_lattice(other, sigma)).astype(float)) / SIGMA
        truth = float(mpmath.sqrt(sum((mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b in zip(one, other))) / sigma)
        assert apart <= truth + Slack(500).distance
    far = on_lattice(np.array([1e300, 2e300, -1e300]), 1.0)
    assert far.tolist() == [2**49, 2**49, -(2**49)]
    with pytest.raises(UserError, match="NaN"):
        on_lattice(np.array([1.0, np.nan]), 1.0)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("dimensions", [1, 1000, 135_000_000])
def test_sigma_pays_for_everything_that_is_stated_and_hardly_more(epsilon, dimensions):
    delta, sensitivity, error = 1e-5, 0.3, 1e-4
    sigma, slack = sigma_for(epsilon, delta, sensitivity, dimensions, error)
    mu = sensitivity / sigma + slack.distance
    assert slack.distance >= 1.5 * math.sqrt(dimensions) * 2.0**-32 + error / sigma * (1 - 1e-12)
    assert epsilon_with(mu, delta, slack) <= epsilon
    assert epsilon_with(mu, delta, slack) >= gaussian_epsilon(delta, mu)
    ideal = sensitivity / gaussian_mu(epsilon, delta)
    assert ideal < sigma < 1.001 * ideal
    assert Slack(135_000_000).epsilon < 1e-5
    assert Slack(135_000_000).distance < 1e-5


def test_a_coarse_relative_of_the_mechanism_keeps_the_stated_pair_by_brute_force():
    """floor(n + s G) at s = 4, where every probability can be summed: its delta is below the Gaussian's at all epsilon,
    at distances that are whole steps, and equal to it as steps become fine."""
    from geoquant.privacy.guarantee.gaussian import gaussian_delta

    for s, shift in ((1.0, 2), (4.0, 3), (40.0, 45)):
        k = np.arange(-600, 601)
        p = np.array([_mass(i / s, (i + 1) / s) for i in k])
        q = np.array([_mass((i - shift) / s, (i - shift + 1) / s) for i in k])
        for epsilon in (0.0, 0.5, 2.0):
            found = np.maximum(p - math.exp(epsilon) * q, 0).sum()
            assert found <= gaussian_delta(epsilon, shift / s) + 1e-12
    assert found == pytest.approx(gaussian_delta(2.0, 45 / 40), rel=1e-2)


def _mass(low: float, high: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(-low) - ndtr(-high)) if low > 0 else float(ndtr(high) - ndtr(low))


def test_so_small_a_delta_is_refused():
    with pytest.raises(UserError, match="128 bits"):
        sigma_for(1.0, 1e-30, 1.0, 135_000_000)
    with pytest.raises(UserError, match="smaller than what drawing"):
        sigma_for(1e-9, 1e-5, 1.0, 135_000_000)

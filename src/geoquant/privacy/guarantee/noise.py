"""Gaussian noise that leaves no trace of floating point, from the operating system's cryptographic generator.

A float Gaussian added to a float gives away its input: which sums can occur depends on it (Mironov 2012). So nothing
here adds floats. A value x, divided by sigma / 2^32, is rounded to the integer n, and what is released is the integer

    n + floor(2^32 G) = floor(n + 2^32 G),    G a standard Gaussian:

a function of the exact Gaussian mechanism on n, so its accounting is that of `gaussian.py`, in any dimension. Only the
distribution of the integer `floor(2^32 G)` must be drawn, whatever n is. What is not exact is stated in `Slack` and
paid for:

- Rounding. Two roundings are at most one step further apart than their values, 1.5 with the errors of the divisions:
  in units of sigma, d coordinates add `1.5 sqrt(d) / 2^32` to the distance of neighbours.
- Which of 4096 cells of width 1/256 holds |G|: inversion of a table of 128-bit integers with as many random bits as
  decide it. Per coordinate the total variation to the truth is below 2^-115, tail beyond 16 sigma included.
- Where in the cell: one of 2^24 places, all alike, kept with probability density / density at the cell's left edge.
  That is computed in double precision, with an error of at most 2^-50 of itself: the argument of the exponential is at
  most 1/16 and exact to 2^-55, a library's exp is within 4 units in the last place, and the middle of a place stands
  for its mean within 2^-60. The uniform it is compared with has as many bits as decide it. Probabilities inside a cell
  are then right within a factor of exp(2^-48).

With factors exp(+-eta) and distance tau per coordinate, an (epsilon, delta) pair of the ideal mechanism becomes

    epsilon + 2 d eta,    e^(d eta) delta + (1 + e^(epsilon + 2 d eta)) d tau.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from geoquant.errors import UserError
from geoquant.privacy.guarantee.gaussian import check_pair, gaussian_epsilon, gaussian_mu

__all__ = ["SOURCE", "Slack", "drawn", "epsilon_with", "on_lattice", "released", "sigma_for"]

SOURCE = "the operating system's cryptographic generator"
FINE = 32  # bits of a sigma
INSIDE = 24  # bits of a place in its cell
CELLS = 4096  # of 2^(INSIDE - FINE) sigma each: 16 sigma
TABLE_BITS = 128
UNIFORM = 64 - INSIDE - 1  # bits left of a word once a place and a sign are taken
CHUNK = 1 << 18
LIMIT = float(1 << 49)  # of |n|: there a difference and two divisions still err by less than a quarter
ETA, TAU = 2.0**-48, 2.0**-115


@dataclass(frozen=True)
class Slack:
    """What `dimensions` coordinates cost beyond the exact Gaussian mechanism.

    extra: error of the values themselves, of both neighbours together, in units of sigma, bounded by who computed them.
    """

    dimensions: int
    extra: float = 0.0

    @property
    def distance(self) -> float:
        """Added to mu."""
        return 1.5 * math.sqrt(self.dimensions) / 2**FINE + self.extra

    @property
    def epsilon(self) -> float:
        """Added to epsilon."""
        return 2 * self.dimensions * ETA

    def ideal_delta(self, epsilon: float, delta: float) -> float:
        """What is left of delta for the ideal mechanism, `epsilon` being at least the whole one; never below a half."""
        if (lost := (1 + math.exp(min(epsilon, 700.0))) * self.dimensions * TAU) >= delta / 4:
            raise UserError(
                "noise drawn with 128 bits cannot give so small a delta with so large an epsilon",
                got=f"{delta:g}, {epsilon:g}",
                wanted=f"delta above {4 * lost:.1e}",
            )
        return (delta - lost) * math.exp(-self.dimensions * ETA)

    @property
    def words(self) -> str:
        return f"{self.distance:.1e} in mu and {self.epsilon:.1e} in epsilon, both included"


def epsilon_with(mu: float, delta: float, slack: Slack) -> float:
    """The least epsilon that holds for this delta once slack is paid; mu includes `slack.distance`."""
    check_pair(0.0, delta)
    # What is lost of delta grows with epsilon: an epsilon above the answer, by at least half of delta, is safe for it.
    above = gaussian_epsilon(delta / 2, mu) + slack.epsilon
    return gaussian_epsilon(slack.ideal_delta(above, delta), mu) + slack.epsilon


def sigma_for(
    epsilon: float, delta: float, sensitivity: float, dimensions: int, error: float = 0.0
) -> tuple[float, Slack]:
    """The least sigma for this pair, and what it pays for.

    error: bound on the error of the values, both neighbours together, in the units of the sensitivity.
    """
    check_pair(epsilon, delta)
    exact = Slack(dimensions)
    if epsilon <= exact.epsilon:
        raise UserError(
            "this epsilon is smaller than what drawing the noise costs", got=epsilon, wanted=f"above {exact.epsilon:g}"
        )
    # As in epsilon_with, at an epsilon that is no smaller than the one taken there.
    above = gaussian_epsilon(delta / 2, gaussian_mu(epsilon, delta)) + exact.epsilon
    mu = gaussian_mu(epsilon - exact.epsilon, exact.ideal_delta(above, delta)) * (1 - 1e-12) - exact.distance
    if mu <= 0:
        raise UserError(
            "so many weights cannot be released with this epsilon", got=f"{dimensions} weights, epsilon {epsilon:g}"
        )
    sigma = (sensitivity + error) / mu
    return sigma, Slack(dimensions, error / sigma)


def on_lattice(values: Float[np.ndarray, ...], sigma: float) -> Int[np.ndarray, ...]:
    """Values in steps of sigma / 2^32, nearest, and no further from zero than 2^49 (which moves no two apart)."""
    if not np.isfinite(values).all():
        raise UserError("private weights hold NaN or infinity", fix="repair the model before it is released")
    with np.errstate(over="ignore"):  # infinity is clipped like any other
        steps = values / math.ldexp(sigma, -FINE)
    return np.rint(np.clip(steps, -LIMIT, LIMIT)).astype(np.int64)


def released(whole: Int[np.ndarray, ...], sigma: float) -> Float[np.ndarray, ...]:
    """What integers `n + floor(2^32 G)` stand for: the middle of their step."""
    return (whole.astype(np.float64) + 0.5) * math.ldexp(sigma, -FINE)


def drawn(shape: tuple[int, ...]) -> Int[np.ndarray, ...]:
    """Integers `floor(2^32 G)`, independent, from fresh randomness that is kept nowhere."""
    count = math.prod(shape)
    found = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        found[start : start + CHUNK] = _drawn(min(CHUNK, count - start), os.urandom)
    return found.reshape(shape)


def _drawn(count: int, source: Callable[[int], bytes]) -> Int[np.ndarray, " count"]:
    cells = _cells(count, source)
    found = np.empty(count, np.int64)
    open_ = np.arange(count)
    while len(open_):
        words = np.frombuffer(source(8 * len(open_)), np.uint64)
        cell = cells[open_]
        place = (words & np.uint64((1 << INSIDE) - 1)).astype(np.int64)
        away = (place + 0.5) * 2.0**-FINE
        keep = np.exp(-away * (cell * 2.0 ** (INSIDE - FINE) + away / 2))
        kept = _below(words >> np.uint64(INSIDE + 1), keep, source)
        size = (cell << INSIDE) | place
        negative = (words >> np.uint64(INSIDE)) & np.uint64(1) == 1
        found[open_[kept]] = np.where(negative, ~size, size)[kept]
        open_ = open_[~kept]
    return found


def _cells(count: int, source: Callable[[int], bytes]) -> Int[np.ndarray, " count"]:
    """The cell of |G|: how many entries of the table are at most a uniform number of 128 bits."""
    whole, tops = _table()
    high = np.frombuffer(source(4 * count), np.uint32)
    cells = np.searchsorted(tops, high, side="right")
    for index in np.flatnonzero((cells > 0) & (tops[cells - 1] == high)):  # 32 bits do not decide it
        rest = int.from_bytes(source(12), "little")
        cells[index] = bisect_right(whole, (int(high[index]) << 96) | rest)
    return cells


def _below(
    uniform: UInt[np.ndarray, " n"], threshold: Float[np.ndarray, " n"], source: Callable[[int], bytes]
) -> Bool[np.ndarray, " n"]:
    """Whether uniform numbers, of which the first bits are given, lie below thresholds in (0, 1)."""
    scaled = threshold * 2.0**UNIFORM
    first = np.floor(scaled)
    below = uniform < first.astype(np.uint64)
    for index in np.flatnonzero(uniform == first.astype(np.uint64)):
        # What is left of the threshold has at most 53 bits.
        below[index] = int.from_bytes(source(8), "little") < math.ldexp(scaled[index] - first[index], 64)
    return below


@cache
def _table() -> tuple[list[int], np.ndarray]:
    """2^128 P(|G| < c / 256) for c = 1..4095, rounded down, and the first 32 bits of each.

    The mass of a cell with middle a and half-width h is `2 phi(a) sum over even k of He_k(a) 2 h^(k+1) / (k+1)!`, He
    the Hermite polynomials: the Taylor series of the density, integrated.
    """
    with localcontext() as context:
        context.prec = 70
        half = Decimal(1) / 512
        scale = 2 / (2 * _pi()).sqrt()
        total, whole = Decimal(0), []
        for cell in range(CELLS - 1):
            middle = Decimal(2 * cell + 1) * half
            before, hermite = Decimal(0), Decimal(1)
            term, mass = half, Decimal(0)
            for k in range(40):
                if k % 2 == 0:
                    mass += hermite * 2 * term
                before, hermite = hermite, middle * hermite - k * before
                term *= half / (k + 2)
            total += scale * (-middle * middle / 2).exp() * mass
            whole.append(int(total * (1 << TABLE_BITS)))
    return whole, np.array([entry >> 96 for entry in whole], np.uint32)


def _pi() -> Decimal:
    """By Machin's formula, to the context's precision."""

    def arctan_inverse(x: int) -> Decimal:
        total, power, k = Decimal(0), Decimal(1) / x, 0
        while abs(power) > Decimal(10) ** -75:
            total += power / (2 * k + 1) * (-1) ** k
            power, k = power / (x * x), k + 1
        return total

    return 4 * (4 * arctan_inverse(5) - arctan_inverse(239))

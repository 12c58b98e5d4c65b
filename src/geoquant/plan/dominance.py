"""A chosen point against families of baselines: which points it dominates, and what a family costs at its leakage.

    A dominates B   where A is better than B by more than the noise on some measure, and worse by more than it on none

as in plan/pareto.py; here it is also told on which measures. Points lie apart in two directions at once, so that a
family may have no point that is dominated and still be the worse choice. Hence the second reading, along the family's
line in the plane of leakage and loss: its points with no other to their lower left, joined by straight lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["BASELINES", "LEVERS", "Mixture", "Versus", "at_level", "line", "versus"]

# What a lever has to beat, by families of plan/points.py.
BASELINES: Mapping[str, tuple[str, ...]] = {
    "fewer bits": ("rounding", "lattice"),
    "interpolation": ("interpolation",),
    "isotropic noise": ("noise",),
}
LEVERS = ("anchor", "shape", "together", "guarantee", "own")


@dataclass(frozen=True)
class Versus:
    """One point against another: the measures on which it is better and worse by more than the noise; and missing ones.

    missing: measured of one of the two alone. Of them nothing is known, so that neither dominates.
    """

    better: tuple[str, ...]
    worse: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def dominates(self) -> bool:
        return bool(self.better) and not self.worse and not self.missing

    @property
    def dominated(self) -> bool:
        return bool(self.worse) and not self.better and not self.missing


@dataclass(frozen=True)
class Mixture:
    """A place on a family's line: `1 - share` of the point `first` and `share` of `second`."""

    first: int
    second: int
    share: float

    def of(self, values: Sequence) -> np.ndarray:
        """The values of both points, mixed. values: of all points, numbers or arrays of one shape."""
        start = np.asarray(values[self.first], float)
        return start + self.share * (np.asarray(values[self.second], float) - start)


def versus(
    values: Float[np.ndarray, "points measures"],
    noise: Float[np.ndarray, "measures points points"],
    names: Sequence[str],
    one: int,
    other: int,
) -> Versus:
    """Point `one` against point `other`. Smaller is better on every measure; NaN: not measured. names: of measures."""
    gain = values[other] - values[one]
    known = np.isfinite(gain)
    half = np.isnan(values[one]) != np.isnan(values[other])
    beyond = np.where(known, noise[:, one, other], np.inf)
    gain = np.where(known, gain, 0.0)

    def chosen(which: np.ndarray) -> tuple[str, ...]:
        return tuple(name for name, this in zip(names, which, strict=True) if this)

    return Versus(chosen(gain > beyond), chosen(-gain > beyond), chosen(half))


def line(leakage: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> tuple[int, ...]:
    """Indices of the points that have no other at most as leaky with at most their loss, the least leakage first.

    The loss falls strictly along it. Points that lack a number are left out; of equal ones the first stays.
    """
    there = [index for index in range(len(loss)) if np.isfinite(leakage[index]) and np.isfinite(loss[index])]
    kept: list[int] = []
    for index in sorted(there, key=lambda index: (leakage[index], loss[index], index)):
        if not kept or loss[index] < loss[kept[-1]]:
            kept.append(index)
    return tuple(kept)


def at_level(leakage: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"], level: float) -> Mixture | None:
    """The least costly place on the line that leaks at most `level`; None where no point leaks so little.

    Between two points both numbers are taken as linear, which is a reading and no measurement. Where even the least
    costly point leaks less than `level`, it is that point.
    """
    steps = line(leakage, loss)
    within = [index for index in steps if leakage[index] <= level]
    if not within:
        return None
    first, place = within[-1], len(within)
    if place == len(steps):
        return Mixture(first, first, 0.0)
    second = steps[place]
    return Mixture(first, second, float((level - leakage[first]) / (leakage[second] - leakage[first])))

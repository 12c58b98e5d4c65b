"""Lengths of a change of weights in a metric that itself changes along the way.

With a positive definite metric M (Fisher, Gauss-Newton; never the Hessian, which may be indefinite) the straight
segment from w to w + delta has the length

    L = int_0^1 sqrt(delta^T M(w + t delta) delta) dt

which is at least the geodesic distance and equals it to second order in delta. With M frozen at w it is the local
length `sqrt(delta^T M(w) delta)`, whose square is twice the quadratic loss; what M's change adds is the third-order
term, `int - local`, by Gauss-Legendre quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["SegmentLength", "segment_length"]

NODES = 5  # exact for polynomials of degree 9


@dataclass(frozen=True)
class SegmentLength:
    """Length of a segment: with the metric at its start throughout, and with the metric along it."""

    local: float
    length: float

    @property
    def correction(self) -> float:
        """What the change of the metric adds, relative to the local length; zero for a change of length zero."""
        return (self.length - self.local) / self.local if self.local else 0.0


def segment_length(energy: Callable[[float], float], nodes: int = NODES) -> SegmentLength:
    """Length of the segment from w to w + delta.

    energy: t to `delta^T M(w + t delta) delta`, asked once at 0 and at `nodes` points between 0 and 1.
    Raises ValueError where it is negative or no number: M was no metric.
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    squares = [energy(0.0), *(energy(float(place)) for place in (places + 1) / 2)]
    if not all(0 <= square < np.inf for square in squares):
        raise ValueError(f"a metric gives no energy below zero, but got {min(squares)}")
    lengths = np.sqrt(squares)
    return SegmentLength(float(lengths[0]), float(lengths[1:] @ weights / 2))

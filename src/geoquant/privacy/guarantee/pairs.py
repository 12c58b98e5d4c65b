"""Neighbours for auditing a release of weights: pairs that show what such mechanisms commonly get wrong.

Far pairs measure noise that is too small. What is given away outright only shows where it decides: rounding before
noise at a boundary between two codes, a weight kept beside the codes when that weight moves, a scale or an order
taken from private weights when it changes. So of one vector of weights six pairs are made, most of them very near.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.two_point import Pair

__all__ = ["weight_pairs"]

LITTLE = 0.02  # steps


def weight_pairs(weights: Float[np.ndarray, " n"], step: float, further: int = 0) -> list[Pair]:
    """Pairs around `weights` (public numbers of the size of real ones, at least four), distances in units of `step`.

    A run's release is (runs, n + further): the weights first, then whatever else is released, such as a scale or the
    column that comes first. Weights are scored along the direction in which they were moved, everything else by itself.
    """
    if len(weights) < 4 or not step > 0:
        raise ValueError(f"needs four weights and a step above 0, got {len(weights)} and {step}")
    x = np.array(weights, np.float64)
    by_size = np.argsort(np.abs(x), kind="stable")
    first, second, edge, outlier = by_size[0], by_size[1], by_size[2], by_size[-1]
    # The edge lies just below the boundary between codes 0 and 1, the first two weights are nearly of one size.
    x[edge] = (0.5 - LITTLE / 2) * step
    x[first], x[second] = 0.2 * step, (0.2 + LITTLE / 2) * step
    moves = {
        "a step apart": {second: step},
        "all weights moved": dict.fromkeys(range(len(x)), step / np.sqrt(len(x))),
        "across a boundary": {edge: LITTLE * step},
        "outlier moved a little": {outlier: LITTLE * step},
        "outlier moved by a step": {outlier: step},
        "order turned around": {first: LITTLE * step},
    }
    pairs = []
    for name, move in moves.items():
        by = np.zeros_like(x)
        by[list(move)] = list(move.values())
        distance = float(np.linalg.norm(by)) / step
        pairs.append(Pair(name, x, x + by, distance, lambda out, by=by: out[:, : len(by)] @ by))
        for index in range(further):
            beside = len(x) + index
            pairs.append(Pair(f"{name}, seen beside", x, x + by, distance, lambda out, at=beside: out[:, at]))
    return pairs

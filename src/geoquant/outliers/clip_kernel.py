"""The innermost loop of the clip curves, compiled: one group of columns on a tile of rows at a time."""

from __future__ import annotations

import numpy as np

from geoquant.compiled import compiled

__all__ = ["add_splits"]

TILE = 256  # rows summed in single precision before they join the sums


@compiled(fastmath={"contract"})
def add_splits(weight, clips, highest, clipped, rounded, beyond):  # pragma: no cover (compiled)
    """Add the errors of one group of columns at every clip.

    weight: (rows, columns). clips: (n,). highest: largest code. clipped, rounded: (n, columns) float64, errors beyond
    the clip and up to it; beyond: (n,) float64, how many weights lie beyond. All three are added to.
    """
    rows, columns = weight.shape
    count = len(clips)
    cut = np.empty((count, columns), dtype=np.float32)
    kept = np.empty((count, columns), dtype=np.float32)
    for first in range(0, rows, TILE):
        cut[:] = np.float32(0.0)
        kept[:] = np.float32(0.0)
        for row in range(first, min(first + TILE, rows)):
            own = weight[row]
            largest = np.float32(1e-30)
            for j in range(columns):
                largest = max(largest, abs(own[j]))
            for index in range(count):
                limit = clips[index] * largest
                step = limit / highest
                inverse = highest / limit
                a, b = cut[index], kept[index]
                above = 0
                for j in range(columns):
                    size = abs(own[j])
                    excess = max(size - limit, np.float32(0.0))
                    inside = size - excess
                    error = inside - step * np.rint(inside * inverse)
                    a[j] += excess * excess
                    b[j] += error * error
                    above += size > limit
                beyond[index] += above
        clipped += cut
        rounded += kept

"""The innermost loops of the box, compiled: a panel of columns on a tile of rows at a time, all in the first caches."""

from __future__ import annotations

import numpy as np

from geoquant.compiled import compiled

__all__ = ["best_symmetric", "boxed_panel"]

TILE = 128  # rows that pass through a panel together


@compiled(fastmath={"contract"})
def boxed_panel(
    work, unboxed, errors, scales, zeros, pivots, factor, start, stop, lowest, highest, top, bottom
):  # pragma: no cover (compiled)
    """Quantize columns `start` to `stop` of a panel in the box and update all columns of the panel behind each, in rows
    `top` to `bottom`.

    work:    (p, rows) weights up to date, one row of memory per column of the layer; updated inside the panel.
    unboxed: (p, rows) codes before the box, errors: (p, rows) `(w - q) / U_jj`; written.
    scales, zeros: (p, rows) steps and zero points, the latter empty if there are none. pivots: (p,) 1/U_jj.
    factor:  (p, p) `U` of the panel.
    """
    columns = work.shape[0]
    shifted = zeros.shape[0] > 0
    for first in range(top, bottom, TILE):
        last = min(first + TILE, bottom)
        size = last - first
        for j in range(start, stop):
            pivot = pivots[j]
            # Views that start at zero: the compiler vectorises loops over them, and not over offsets.
            own, code, error, step = (
                work[j, first:last],
                unboxed[j, first:last],
                errors[j, first:last],
                scales[j, first:last],
            )
            if shifted:
                zero = zeros[j, first:last]
                for i in range(size):
                    code[i] = np.rint(own[i] / step[i]) + zero[i]
                    error[i] = (own[i] - (min(max(code[i], lowest), highest) - zero[i]) * step[i]) * pivot
            else:
                for i in range(size):
                    code[i] = np.rint(own[i] / step[i])
                    error[i] = (own[i] - min(max(code[i], lowest), highest) * step[i]) * pivot
            for other in range(j + 1, columns):
                share, later = factor[j, other], work[other, first:last]
                for i in range(size):
                    later[i] -= share * error[i]


@compiled(fastmath={"contract"})
def best_symmetric(weight, importance, shares, lowest, highest, scales, top, bottom):  # pragma: no cover (compiled)
    """The search of `grid.search_scales` on a symmetric grid; writes `scales`, (rows,), from `top` to `bottom`.

    weight: (columns, rows) of one group. importance: (columns,). shares: what to divide by the largest weight of a row
    to get the inverse steps to try.
    """
    columns = weight.shape[0]
    work = np.empty((5, TILE), dtype=np.float32)
    largest, best, a, b, inverse = work[0], work[1], work[2], work[3], work[4]
    for first in range(top, bottom, TILE):
        last = min(first + TILE, bottom)
        size = last - first
        found = scales[first:last]
        largest[:] = np.float32(1e-12)
        for j in range(columns):
            own = weight[j, first:last]
            for i in range(size):
                largest[i] = max(largest[i], abs(own[i]))
        for i in range(size):
            best[i] = np.float32(-1.0)
            found[i] = -largest[i] / lowest
        for attempt in range(len(shares) + 1):
            for i in range(size):
                inverse[i] = shares[attempt] / largest[i] if attempt < len(shares) else np.float32(1.0) / found[i]
                a[i] = b[i] = np.float32(0.0)
            for j in range(columns):
                own, weighs = weight[j, first:last], importance[j]
                for i in range(size):
                    code = min(max(np.rint(own[i] * inverse[i]), lowest), highest)
                    weighed = weighs * code
                    a[i] += weighed * own[i]
                    b[i] += weighed * code
            for i in range(size):
                if b[i] > 0:
                    square = max(b[i], np.float32(1e-30))
                    gain = a[i] * a[i] / square
                    if gain > best[i]:
                        best[i] = gain
                        found[i] = a[i] / square

"""The innermost loops, compiled: a panel of columns on one block of rows at a time, all in the first caches."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["best_symmetric", "boxed_panel", "panel"]

TILE = 128  # rows that pass through a panel together


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def panel(centres, work, codes, steps, shares, feedback, sizes):  # pragma: no cover (compiled)
    """Quantize the columns of a panel, in place.

    centres:  (p, rows) what to round, one row of memory per column of the layer; updated inside the panel.
    work:     (p, rows) weights, which become the errors `w - q`. codes: (p, rows) int32, written.
    steps:    (p,) step per column. shares: (p, p) `V_kj / V_jj` of the panel.
    feedback: (blocks, size, size) unit upper triangular row factors, or no block at all. sizes: rows of each block.
    """
    columns = work.shape[0]
    target = np.empty(feedback.shape[1], dtype=work.dtype)
    first = 0
    for block in range(len(sizes)):
        size = sizes[block]
        last = first + size
        for j in range(columns):
            step = steps[j]
            # Views that start at zero: the compiler vectorises loops over them, and not over offsets.
            own, own_codes, errors = centres[j, first:last], codes[j, first:last], work[j, first:last]
            if feedback.shape[0] == 0:
                for i in range(size):
                    code = np.rint(own[i] / step)
                    own_codes[i] = np.int32(code)
                    errors[i] -= code * step
            else:
                target[:size] = own
                for i in range(size):
                    code = np.rint(target[i] / step)
                    own_codes[i] = np.int32(code)
                    errors[i] -= code * step
                    rest = target[i] - code * step
                    after, given = target[i + 1 : size], feedback[block, i, i + 1 : size]
                    for k in range(len(after)):
                        after[k] -= rest * given[k]
            for other in range(j + 1, columns):
                share, later = shares[j, other], centres[other, first:last]
                for i in range(size):
                    later[i] += share * errors[i]
        first = last


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def boxed_panel(
    work, unboxed, errors, scales, zeros, pivots, factor, start, stop, lowest, highest
):  # pragma: no cover (compiled)
    """Quantize columns `start` to `stop` of a panel in the box and update all columns of the panel behind each.

    work:    (p, rows) weights up to date, one row of memory per column of the layer; updated inside the panel.
    unboxed: (p, rows) codes before the box, errors: (p, rows) `(w - q) / U_jj`; written.
    scales, zeros: (p, rows) steps and zero points, the latter empty if there are none. pivots: (p,) 1/U_jj.
    factor:  (p, p) `U` of the panel.
    """
    columns, rows = work.shape
    shifted = zeros.shape[0] > 0
    for first in range(0, rows, TILE):
        last = min(first + TILE, rows)
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


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def best_symmetric(weight, importance, shares, lowest, highest, scales):  # pragma: no cover (compiled)
    """The search of `grid.search_scales` on a symmetric grid; writes `scales`, (rows,).

    weight: (columns, rows) of one group. importance: (columns,). shares: what to divide by the largest weight of a row
    to get the inverse steps to try.
    """
    columns, rows = weight.shape
    work = np.empty((5, TILE), dtype=np.float32)
    largest, best, a, b, inverse = work[0], work[1], work[2], work[3], work[4]
    for first in range(0, rows, TILE):
        last = min(first + TILE, rows)
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

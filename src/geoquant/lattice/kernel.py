"""The innermost loops, compiled: a panel of columns on one block of rows at a time, all in the first caches."""

from __future__ import annotations

import numpy as np

from geoquant.compiled import compiled

__all__ = ["SUB", "best_symmetric", "boxed_panel", "panel"]

TILE = 128  # rows that pass through a panel together
TOGETHER = 2  # blocks of rows that take turns
SUB = 4  # rows whose errors move the later ones together


@compiled(fastmath={"contract"})
def panel(
    centres, work, codes, steps, shares, feedback, starts, sizes, row_costs, column_costs, saved, row_kind, column_kind
):  # pragma: no cover (compiled)
    """Quantize the columns of a panel in some blocks of rows, in place.

    centres:  (p, rows) what to round, one row of memory per column of the layer; updated inside the panel.
    work:     (p, rows) weights, which become the errors `w - q`. codes: (p, rows) int32, written.
    steps:    (p,) step per column. shares: (p, p) `V_kj / V_jj` of the panel.
    feedback: (blocks, size, size) unit upper triangular row factors, size a multiple of SUB, or no block at all.
    starts, sizes: first row and rows of each block.

    The rest serves `lattice/priced`: a code goes one step towards zero where that saves more than it costs. With d the
    distance of the centre from the nearest code, away from zero, the square grows by `1 + 2 d`.
    row_costs: (rows,) and column_costs: (p,) what a squared step costs, by product. row_kind: (rows,) and
    column_kind: (p,) the class of a code, by sum.
    saved: (classes, reach) price of the bits that a code of some size loses by the step; zero in the last column, which
    is for all sizes beyond. None of all: every code is the nearest.
    """
    columns, size = work.shape[0], feedback.shape[1]
    target, rests = np.zeros((TOGETHER, size), dtype=work.dtype), np.zeros((TOGETHER, SUB), dtype=work.dtype)
    for head in range(0, len(sizes), TOGETHER):
        count = min(TOGETHER, len(sizes) - head)
        first, last = starts[head], starts[head + count - 1] + sizes[head + count - 1]
        for j in range(columns):
            step = steps[j]
            inverse = np.float32(1.0) / step
            # Views that start at zero: the compiler vectorises loops over them, and not over offsets.
            own, own_codes, errors = centres[j, first:last], codes[j, first:last], work[j, first:last]
            _gather(own, work, shares, j, first, last)
            if feedback.shape[0] == 0:
                for i in range(len(own)):
                    code = np.rint(own[i] * inverse)
                    if saved is not None:
                        kind, cost = row_kind[first + i] + column_kind[j], row_costs[first + i] * column_costs[j]
                        code = _cheaper(code, own[i] * inverse, cost, saved, kind)
                    own_codes[i] = np.int32(code)
                    errors[i] -= code * step
                continue
            for b in range(count):
                begin, rows = starts[head + b] - first, sizes[head + b]
                target[b, :rows] = own[begin : begin + rows]
                target[b, rows:] = 0
            # A row waits for the one before it. So that it need not wait for much else, errors go to the next few rows
            # at once and to the others together; and blocks, which know nothing of each other, take turns.
            for sub in range(0, size, SUB):
                for i in range(sub, sub + SUB):
                    for b in range(count):
                        if i < sizes[head + b]:
                            value = target[b, i]
                            code = np.rint(value * inverse)
                            if saved is not None:
                                at = starts[head + b] + i
                                kind, cost = row_kind[at] + column_kind[j], row_costs[at] * column_costs[j]
                                code = _cheaper(code, value * inverse, cost, saved, kind)
                            rest = value - code * step
                            rests[b, i - sub], target[b, i] = rest, code
                            for k in range(i + 1, sub + SUB):
                                target[b, k] -= rest * feedback[head + b, i, k]
                after = sub + SUB
                if after < size:
                    for b in range(count):
                        given, later = feedback[head + b], target[b, after:]
                        w, x, y, z = rests[b, 0], rests[b, 1], rests[b, 2], rests[b, 3]
                        one, two, three, four = (
                            given[sub, after:],
                            given[sub + 1, after:],
                            given[sub + 2, after:],
                            given[sub + 3, after:],
                        )
                        for k in range(len(later)):
                            later[k] -= w * one[k] + x * two[k] + y * three[k] + z * four[k]
            for b in range(count):
                begin, rows = starts[head + b] - first, sizes[head + b]
                found, into, left = target[b, :rows], own_codes[begin : begin + rows], errors[begin : begin + rows]
                for i in range(rows):
                    into[i] = np.int32(found[i])
                    left[i] -= found[i] * step


@compiled(fastmath={"contract"})
def _cheaper(code, centre, cost, saved, kind):  # pragma: no cover (compiled)
    """The code, or the next one towards zero; without a branch that nobody can predict."""
    side = np.float32(1.0) if code > 0 else np.float32(-1.0)
    grows = np.float32(1.0) + np.float32(2.0) * (centre - code) * side
    kind = min(max(kind, 0), saved.shape[0] - 1)
    # Compared before it becomes an integer, and in this order: what is no number, or too large for one, is the limit.
    price = saved[kind, np.int64(min(np.float32(saved.shape[1] - 1), abs(code)))]
    return code - side * np.float32((code != 0) & (cost * grows < price))


@compiled(fastmath={"contract"})
def _gather(own, work, shares, j, first, last):  # pragma: no cover (compiled)
    """Add to `own` its shares of the errors of the columns before j, four columns at a time."""
    whole = j - j % 4
    for k in range(0, whole, 4):
        a, b, c, d = shares[k, j], shares[k + 1, j], shares[k + 2, j], shares[k + 3, j]
        one, two, three, four = (
            work[k, first:last],
            work[k + 1, first:last],
            work[k + 2, first:last],
            work[k + 3, first:last],
        )
        for i in range(len(own)):
            own[i] += a * one[i] + b * two[i] + c * three[i] + d * four[i]
    for k in range(whole, j):
        share, errors = shares[k, j], work[k, first:last]
        for i in range(len(own)):
            own[i] += share * errors[i]


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

"""The innermost recursion, compiled: a panel of columns on one block of rows at a time, all in the first cache."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["panel"]


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

"""The innermost recursion, compiled: a panel of columns on one block of rows at a time, all in the first cache."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["panel"]


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def panel(work, codes, errors, steps, pivots, factor, feedback, sizes):  # pragma: no cover (compiled)
    """Quantize the columns of a panel, in place.

    work:     (p, rows) targets, one row of memory per column of the layer; updated inside the panel.
    codes:    (p, rows) int32, errors: (p, rows) `(w - q) / U_jj`; written.
    steps, pivots: (p,) step and 1/U_jj per column. factor: (p, p) `U` of the panel.
    feedback: (blocks, size, size) unit upper triangular row factors, or no block at all. sizes: rows of each block.
    """
    columns = work.shape[0]
    target = np.empty(feedback.shape[1], dtype=work.dtype)
    first = 0
    for block in range(len(sizes)):
        size = sizes[block]
        last = first + size
        for j in range(columns):
            step, pivot = steps[j], pivots[j]
            # Views that start at zero: the compiler vectorises loops over them, and not over offsets.
            own, own_codes, own_errors = work[j, first:last], codes[j, first:last], errors[j, first:last]
            if feedback.shape[0] == 0:
                for i in range(size):
                    code = np.rint(own[i] / step)
                    own_codes[i] = np.int32(code)
                    own_errors[i] = (own[i] - code * step) * pivot
            else:
                target[:size] = own
                for i in range(size):
                    code = np.rint(target[i] / step)
                    own_codes[i] = np.int32(code)
                    own_errors[i] = (own[i] - code * step) * pivot
                    rest = target[i] - code * step
                    after, shares = target[i + 1 : size], feedback[block, i, i + 1 : size]
                    for k in range(len(after)):
                        after[k] -= rest * shares[k]
            for other in range(j + 1, columns):
                share, later = factor[j, other], work[other, first:last]
                for i in range(size):
                    later[i] -= share * own_errors[i]
        first = last

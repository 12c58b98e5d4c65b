"""The innermost recursion, compiled: a panel of columns on one block of rows at a time, all in the first cache."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["panel"]


@numba.njit(cache=True, nogil=True)
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
            if feedback.shape[0] == 0:
                for r in range(first, last):
                    code = np.rint(work[j, r] / step)
                    codes[j, r] = np.int32(code)
                    errors[j, r] = (work[j, r] - code * step) * pivot
            else:
                for i in range(size):
                    target[i] = work[j, first + i]
                for i in range(size):
                    code = np.rint(target[i] / step)
                    codes[j, first + i] = np.int32(code)
                    errors[j, first + i] = (work[j, first + i] - code * step) * pivot
                    rest = target[i] - code * step
                    for k in range(i + 1, size):
                        target[k] -= rest * feedback[block, i, k]
            for other in range(j + 1, columns):
                share = factor[j, other]
                for r in range(first, last):
                    work[other, r] -= share * errors[j, r]
        first = last

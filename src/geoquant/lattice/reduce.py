"""Lattice reduction, with what it can gain told first.

Facts that make it an experiment here and not a default (tests/test_reduce.py shows each): the product of the
Gram-Schmidt lengths is the same in every basis of a lattice, so it is no objective; size reduction changes no plane and
hence not Babai's point; a swap can only lower `sum r_j^2`, whose floor `c det^(2/c)` is known from one factorisation;
and only signed permutations map a box of codes to a box. Steps `s_j = D / r_j` already stand on the floor.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.compiled import compiled

__all__ = ["headroom", "lll"]

DELTA = 0.99


def headroom(lengths: Float[Tensor, " n"]) -> float:
    """The largest share of `sum r_j^2` (so of Babai's expected error) that any reduction could remove."""
    squares = lengths.double().square()
    return 1.0 - (len(squares) * squares.log().mean().exp() / squares.sum()).item()


def lll(basis: Float[Tensor, "n n"], delta: float = DELTA) -> tuple[Float[Tensor, "n n"], Int[Tensor, "n n"], int]:
    """LLL-reduced upper triangular basis `R'`, unimodular `T` with `R T = Q R'` for a rotation Q, and the swaps.

    Lenstra, Lenstra, Lovasz 1982, on the triangular factor: Givens rotations after a swap, size reduction only of the
    vector at hand. Double precision; the damped metrics here have condition numbers far below what that bears.
    """
    reduced = basis.to(torch.float64).numpy().copy()
    transform = np.eye(len(reduced), dtype=np.int64)
    swaps = _lll(reduced, transform, delta)
    return torch.from_numpy(reduced), torch.from_numpy(transform), int(swaps)


@compiled()
def _lll(r, t, delta):  # pragma: no cover (compiled)
    """In place; returns the number of swaps."""
    n, k, swaps = r.shape[0], 1, 0
    while k < n:
        for i in range(k - 1, -1, -1):
            turns = np.rint(r[i, k] / r[i, i])
            if turns != 0.0:
                for row in range(i + 1):
                    r[row, k] -= turns * r[row, i]
                whole = np.int64(turns)
                for row in range(n):
                    t[row, k] -= whole * t[row, i]
        above, own = r[k - 1, k], r[k, k]
        if above * above + own * own >= delta * r[k - 1, k - 1] ** 2:
            k += 1
            continue
        swaps += 1
        for row in range(k + 1):
            r[row, k - 1], r[row, k] = r[row, k], r[row, k - 1]
        for row in range(n):
            t[row, k - 1], t[row, k] = t[row, k], t[row, k - 1]
        # The swap leaves one entry below the diagonal: rotate it away.
        length = np.hypot(r[k - 1, k - 1], r[k, k - 1])
        cosine, sine = r[k - 1, k - 1] / length, r[k, k - 1] / length
        for column in range(k - 1, n):
            upper, lower = r[k - 1, column], r[k, column]
            r[k - 1, column] = cosine * upper + sine * lower
            r[k, column] = -sine * upper + cosine * lower
        r[k, k - 1] = 0.0
        if r[k, k] < 0.0:
            for column in range(k, n):
                r[k, column] = -r[k, column]
        k = max(k - 1, 1)
    return swaps

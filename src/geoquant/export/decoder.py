"""The decoder of coded tensors, compiled: constriction's ANS stream without calls per rectangle, free of Python's lock.

The stream is constriction's `AnsCoder`: 32-bit words read from the end, a state of 64 bits, probabilities of 24. A
symbol is found from the low 24 bits of the state by a table of `1 << LOOKUP` entries and a short search. Fixed-point
probabilities are those of constriction's `Categorical(..., perfect=False)`, in float32 as there. A test compares both
decoders on random tables; a stream decoded with other tables than its own does not end where it should.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

__all__ = ["Lookup", "decode_stream", "make_lookup"]

PRECISION = 24
LOOKUP = 11


@dataclass(frozen=True)
class Lookup:
    """Cumulative probabilities of all tables one after another (uint64, of 2^24), where each begins, where to start the
    search for a value of the state (classes, 2^LOOKUP), and each table's reach.
    """

    cumulative: np.ndarray
    starts: np.ndarray
    first: np.ndarray
    reaches: np.ndarray


def cumulative_of(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) left ends of each symbol's interval of [0, 2^24], and the right end of all."""
    shares = (counts / counts.sum()).astype(np.float32)
    # Left ends are sums of float32 in float32, each symbol getting one unit beside its share: as constriction does it.
    sums = np.cumsum(np.concatenate([np.zeros(1, np.float32), shares]), dtype=np.float32)
    scale = np.float32((1 << PRECISION) - len(shares)) / sums[-1]
    ends = (sums[:-1] * scale).astype(np.int64) + np.arange(len(shares))
    return np.append(ends, 1 << PRECISION).astype(np.uint64)


def make_lookup(tables: tuple[np.ndarray, ...]) -> Lookup:
    """For the counts of all classes, see `coder.Tables`. Raises ValueError where counts are none."""
    if any(len(counts) < 2 or counts.min() < 1 for counts in tables):
        raise ValueError("a table holds counts below one")
    parts = [cumulative_of(counts) for counts in tables]
    grid = np.arange(1 << LOOKUP, dtype=np.uint64) << np.uint64(PRECISION - LOOKUP)
    first = np.stack([np.searchsorted(part, grid, side="right") - 1 for part in parts])
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    reaches = np.array([(len(counts) - 2) // 2 for counts in tables])
    return Lookup(np.concatenate(parts), starts.astype(np.int64), first.astype(np.int32), reaches.astype(np.int64))


@numba.njit(cache=True, nogil=True)
def decode_stream(
    words, escapes, rectangles, rows, columns, cumulative, starts, first, reaches, codes
):  # pragma: no cover (compiled)
    """Decode one stream into `codes` (rows, columns), int32; whether it ends where its codes do.

    words: uint32. escapes: int32 values beyond their tables. rectangles: (n, 5) class, first and last row, first and
    last column in sorted order; rows, columns: where the sorted ones belong. The rest as in `Lookup`.
    """
    one, half, full = np.uint64(1), np.uint64(32), np.uint64(PRECISION)
    mask, low, shift = (one << full) - one, one << half, np.uint64(PRECISION - LOOKUP)
    position = len(words)
    state = np.uint64(0)
    while position > 0 and state < low:
        position -= 1
        state = (state << half) | np.uint64(words[position])
    taken = 0
    for index in range(len(rectangles)):
        kind = rectangles[index, 0]
        table, reach, start = cumulative[starts[kind] :], reaches[kind], first[kind]
        for r in range(rectangles[index, 1], rectangles[index, 2]):
            row = codes[rows[r]]
            for c in range(rectangles[index, 3], rectangles[index, 4]):
                place = state & mask
                symbol = start[np.int64(place >> shift)]
                while table[symbol + 1] <= place:
                    symbol += 1
                left = table[symbol]
                state = (state >> full) * (table[symbol + 1] - left) + (place - left)
                if state < low and position > 0:
                    position -= 1
                    state = (state << half) | np.uint64(words[position])
                value = symbol - reach
                if value > reach:
                    if taken == len(escapes):
                        return False
                    value = escapes[taken]
                    taken += 1
                row[columns[c]] = value
    return taken == len(escapes) and position == 0 and state == 0

"""Tables in the form that the decoder searches: constriction's fixed-point probabilities as packed intervals.

Probabilities are those of constriction's `Categorical(..., perfect=False)`, in float32 as there. A symbol's interval of
[0, 2^24] is one number of 64 bits, `left << 40 | width << 16 | symbol`, so that one load finds all of it. The upper
LOOKUP bits of a point name a slot, which holds the interval of its first point; a short search goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geoquant.export.decoder import LOOKUP, PRECISION, SYMBOL

__all__ = ["Lookup", "make_lookup"]


@dataclass(frozen=True)
class Lookup:
    """All tables of a model.

    slots: (classes, 2^LOOKUP) intervals, uint64. intervals: of all symbols, one table after another. starts: where each
    table begins. reaches: of each table.
    """

    slots: np.ndarray
    intervals: np.ndarray
    starts: np.ndarray
    reaches: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """For the compiled functions."""
        return self.slots, self.intervals, self.starts, self.reaches


def make_lookup(tables: tuple[np.ndarray, ...]) -> Lookup:
    """For the counts of all classes, see `coder.Tables`. Raises ValueError where counts are none."""
    if any(len(counts) < 2 or counts.min() < 1 for counts in tables):
        raise ValueError("a table holds counts below one")
    points = np.arange(1 << LOOKUP) << (PRECISION - LOOKUP)
    parts, slots = [], []
    for counts in tables:
        ends = ends_of(counts)
        widths, symbols = np.diff(ends), np.arange(len(counts))
        if widths.min() < 1 or len(counts) > 1 << SYMBOL:
            raise ValueError("a table holds too many counts")
        parts.append((ends[:-1] << PRECISION + SYMBOL | widths << SYMBOL | symbols).view(np.uint64))
        slots.append(parts[-1][np.searchsorted(ends, points, side="right") - 1])
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    reaches = np.array([(len(counts) - 2) // 2 for counts in tables])
    return Lookup(np.stack(slots), np.concatenate(parts), starts.astype(np.int64), reaches.astype(np.int64))


def ends_of(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) left ends of each symbol's interval of [0, 2^24], and the right end of all."""
    shares = (counts / counts.sum()).astype(np.float32)
    # Left ends are sums of float32 in float32, each symbol getting one unit beside its share: as constriction does it.
    sums = np.cumsum(np.concatenate([np.zeros(1, np.float32), shares]), dtype=np.float32)
    scale = np.float32((1 << PRECISION) - len(shares)) / sums[-1]
    ends = (sums[:-1] * scale).astype(np.int64) + np.arange(len(shares))
    return np.append(ends, 1 << PRECISION)

"""From coded matrices to codes: the streams of several matrices side by side, for the decoder that wants many.

A decoder of one stream waits most of the time (see `decoder`), and most matrices of a small model are one stream: so
matrices are decoded together, into one array of which each gets its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geoquant.export.coder import rectangles
from geoquant.export.decoder import decode_streams
from geoquant.export.lookup import Lookup
from geoquant.lattice.rate import CLASSES

__all__ = ["Matrix", "decode"]


@dataclass(frozen=True)
class Matrix:
    """A coded matrix: its streams one after another, what each takes of them, and the classes of rows and columns."""

    words: np.ndarray  # uint32
    escapes: np.ndarray  # int32
    sizes: np.ndarray  # (streams, 3) rows, words, escapes
    rows: np.ndarray  # classes: narrow integers are sorted faster
    columns: np.ndarray

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.columns)

    def check(self) -> None:
        """Raise ValueError where the sizes are not those of what is there: compiled code does not look."""
        whole = [len(self.rows), len(self.words), len(self.escapes)]
        bad = (self.sizes < 0).any() or (self.sizes[:, 0] < 1).any() or not len(self.columns)
        if bad or self.sizes.sum(axis=0, dtype=np.int64).tolist() != whole:
            raise ValueError("the sizes of the streams are not those of what is there")


def decode(matrices: Sequence[Matrix], lookup: Lookup) -> list[np.ndarray]:
    """The codes of each, int16, or int32 where an escape needs it; views of one array.

    Raises ValueError where streams and what lies beside them do not fit.
    """
    if len(lookup.reaches) != CLASSES:
        raise ValueError(f"got {len(lookup.reaches)} tables, wanted {CLASSES}")
    streams, places, rows, columns = [], [], [], []
    words = escapes = row = column = start = 0
    for matrix in matrices:
        matrix.check()
        column_order, width = np.argsort(matrix.columns, kind="stable"), len(matrix.columns)
        first = 0
        for count, length, outside in matrix.sizes.tolist():
            part = matrix.rows[first : first + count]
            order = np.argsort(part, kind="stable")
            before = len(places)
            places += [
                (kind, row + r.start, row + r.stop, column + c.start, column + c.stop)
                for kind, r, c in rectangles(part[order], matrix.columns[column_order])
            ]
            streams.append((words + 1, words + length, escapes, escapes + outside, before, len(places)))
            rows.append(start + (order + first) * width)
            words, escapes, row, first = words + length, escapes + outside, row + count, first + count
        columns.append(column_order.astype(np.uint32))
        column, start = column + width, start + matrix.size
    streams.sort(key=lambda stream: stream[0] - stream[1])  # long ones first: they end together
    beyond = np.concatenate([matrix.escapes for matrix in matrices])
    wide = len(beyond) and max(-int(beyond.min()), int(beyond.max())) >= 1 << 15
    codes = np.empty(start, np.int32 if wide else np.int16)
    arrays = (
        np.concatenate([np.zeros(1, np.uint32), *(matrix.words for matrix in matrices)]),
        beyond,
        np.array(streams, np.int64).reshape(-1, 6),
        np.array(places, np.int64).reshape(-1, 5),
        np.concatenate(rows),
        np.concatenate(columns),
    )
    if not decode_streams(*arrays, *lookup.arrays, codes):
        raise ValueError("a stream does not end where its codes do")
    parts = np.split(codes, np.cumsum([matrix.size for matrix in matrices])[:-1])
    return [part.reshape(len(matrix.rows), -1) for part, matrix in zip(parts, matrices)]

"""Entropy coding of integer codes: constriction's ANS coder under static distributions, one per class.

A code's class is the sum of its row's and its column's (lattice/rate). Distributions are counted over all codes of
a model and stored once, as integers; a value outside its class's table is coded as the last symbol of the table (the
escape) and listed beside the stream. Streams hold a range of rows each, so a matrix is decoded in parallel and
without its neighbours.

Order inside a stream: row classes ascending, inside them column classes ascending; each such rectangle row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import constriction
import numpy as np

from geoquant.export.lookup import Lookup, make_lookup
from geoquant.lattice.rate import CLASSES

__all__ = ["Coded", "Tables", "encode", "make_tables", "rectangles"]

RARE = 5e-5  # share of a class's codes that may lie beyond its table
TOTAL = 1 << 16  # counts of a table sum to about this


@dataclass(frozen=True)
class Tables:
    """Static distributions: for class k, `counts[k]` of the values -m_k..m_k and of the escape, m_k its reach."""

    counts: tuple[np.ndarray, ...]

    def reach(self, index: int) -> int:
        return (len(self.counts[index]) - 2) // 2

    def models(self) -> list:
        """The coder's models; exact, since counts over 2^16 are exact in float32 up to one common factor."""
        return [
            constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
            for counts in self.counts
        ]

    def lookup(self) -> Lookup:
        """The same for the decoder."""
        return make_lookup(self.counts)


@dataclass(frozen=True)
class Coded:
    """One stream: ANS words, and the values that escaped, in the order of the stream."""

    words: np.ndarray  # uint32
    escapes: np.ndarray  # int32


def make_tables(histograms: np.ndarray) -> Tables:
    """Tables from the counts (classes, values) of all codes, see `class_histograms`.

    A class's reach leaves RARE of its codes to the escape: every entry of a table takes a count of at least one, and a
    few outliers must not fill it with empty entries.
    """
    tables = []
    for counts in histograms:
        middle = (len(counts) - 2) // 2
        sizes = counts[middle : 2 * middle + 1].copy()  # of the values by magnitude
        sizes[1:] += counts[:middle][::-1]
        beyond = counts.sum() - np.cumsum(sizes)
        reach = int(np.argmax(beyond <= RARE * counts.sum())) if beyond[-1] <= RARE * counts.sum() else middle
        table = np.append(counts[middle - reach : middle + reach + 1], beyond[reach])
        scaled = np.maximum(1, np.round(table * (TOTAL / max(1, table.sum())))).astype(np.int64)
        tables.append(np.minimum(scaled, TOTAL - 1))
    return Tables(tuple(tables))


def rectangles(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[int, slice, slice]]:
    """(class, rows, columns) of every rectangle, for class vectors that are sorted."""

    def runs(sorted_classes: np.ndarray) -> list[tuple[int, slice]]:
        values, starts = np.unique(sorted_classes, return_index=True)
        stops = [*starts[1:], len(sorted_classes)]
        return [(int(value), slice(start, stop)) for value, start, stop in zip(values, starts, stops)]

    column_runs = runs(columns)
    for row_class, row_run in runs(rows):
        for column_class, column_run in column_runs:
            yield min(max(row_class + column_class, 0), CLASSES - 1), row_run, column_run


def encode(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray, tables: Tables, models: list) -> Coded:
    """Code a matrix (out, in) with row classes `rows` and column classes `columns`."""
    row_order, column_order = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
    sorted_codes = codes[row_order][:, column_order].astype(np.int32)
    pieces, escapes = [], []
    for index, row_run, column_run in rectangles(rows[row_order], columns[column_order]):
        reach = tables.reach(index)
        values = sorted_codes[row_run, column_run].ravel()
        outside = np.abs(values) > reach
        escapes.append(values[outside])
        pieces.append((index, np.where(outside, 2 * reach + 1, values + reach).astype(np.int32)))
    coder = constriction.stream.stack.AnsCoder()
    for index, symbols in reversed(pieces):  # a stack: what is pushed last is decoded first
        coder.encode_reverse(symbols, models[index])
    return Coded(coder.get_compressed(), np.concatenate(escapes).astype(np.int32))

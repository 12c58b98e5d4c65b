"""How many bits the codes of a lattice cost once an entropy coder has seen them.

Codes of one site are far from alike: their spread follows the row's and the column's steps and weights. So each row
and each column carries a small integer (a byte of side information), and the *class* of a code is the sum of its row's
and its column's: one static distribution per class is then within a few thousandths of a bit of the site's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from geoquant.compiled import compiled

__all__ = [
    "CLASSES",
    "REACH",
    "SIDE_BITS",
    "Spread",
    "class_histograms",
    "code_bits",
    "counted",
    "entropy_bits",
    "site_bits",
    "spread_of",
]

# The spread of class k is exp(k * WIDTH + LOWEST): from nearly always zero to hundreds of steps.
WIDTH = 0.2
LOWEST = -3.0
CLASSES = 48
REACH = 1023  # values beyond are counted as escapes
ESCAPE_BITS = 32
TABLES = 4  # of counters
SIDE_BITS = 16  # one byte for a step, one for a class


@dataclass(frozen=True)
class Spread:
    """Class of code (i, j) = clamp(rows_i + columns_j, 0, CLASSES - 1); both int8."""

    rows: Int[Tensor, " out"]
    columns: Int[Tensor, " in"]

    def classes(self) -> Int[Tensor, "out in"]:
        """int64 (out, in)."""
        return (self.rows[:, None].long() + self.columns[None, :].long()).clamp_(0, CLASSES - 1)

    def part(self, start: int, stop: int) -> Spread:
        """Of some of the rows."""
        return Spread(self.rows[start:stop], self.columns)


def spread_of(codes: Integer[Tensor, "out in"], rounds: int = 3) -> Spread:
    """Fit `std z_ij ~ rho_i kappa_j` by alternating second moments and round both to classes."""
    known, (count, width) = codes.cpu().contiguous().numpy(), codes.shape
    rows, columns = np.empty(count, np.float32), np.ones(width, np.float32)
    for _ in range(rounds):
        weights, columns = 1 / (columns * np.float32(width)), np.zeros_like(columns)
        _second_moments(known, weights, rows, columns)
        columns /= np.float32(count)
    row_level, column_level = (torch.from_numpy(squares).log() / 2 for squares in (rows, columns))
    level = column_level.mean()
    row_class = torch.round((row_level + level - LOWEST) / WIDTH)
    column_class = torch.round((column_level - level) / WIDTH)
    return Spread(*(index.clamp(-127, 127).to(codes.device, torch.int8) for index in (row_class, column_class)))


@compiled(fastmath={"contract", "reassoc"})
def _second_moments(codes, weights, rows, columns):  # pragma: no cover (compiled)
    """rows: mean square of each row's codes by the weights of the columns, written. columns: sums of squares by the
    reciprocals of the rows', added to."""
    energy = np.empty(len(columns), np.float32)
    for i in range(len(rows)):
        own, total = codes[i], np.float32(0.0)
        for j in range(len(own)):
            code = np.float32(own[j])
            energy[j] = code * code + np.float32(1e-3)
            total += energy[j] * weights[j]
        rows[i] = total
        share = np.float32(1.0) / total
        for j in range(len(own)):
            columns[j] += share * energy[j]


def class_histograms(codes: Integer[Tensor, "out in"], spread: Spread) -> Int[Tensor, "classes symbols"]:
    """Counts of the values -REACH..REACH by class, and in the last column of those beyond; on the CPU."""
    known = counted(codes, spread)
    reach = known.shape[1] // 2 - 1
    counts = known.new_zeros(CLASSES, 2 * REACH + 2)
    counts[:, REACH - reach : REACH + reach + 1] = known[:, :-1]
    counts[:, -1] = known[:, -1]
    return counts


def counted(codes: Integer[Tensor, "out in"], spread: Spread) -> Int[Tensor, "classes symbols"]:
    """The same of the values -r..r, r the size of the largest code or REACH: most sites have few."""
    largest = max(abs(int(code)) for code in codes.aminmax()) if codes.numel() else 0
    counts = np.zeros((TABLES, CLASSES, 2 * min(largest, REACH) + 2), dtype=np.int64)
    _count(*(x.cpu().contiguous().numpy() for x in (codes, spread.rows, spread.columns)), counts)
    return torch.from_numpy(counts.sum(0))


@compiled()
def _count(codes, row_class, column_class, counts):  # pragma: no cover (compiled)
    """Add every code to the count of its class and value, in any of the tables."""
    _, classes, symbols = counts.shape
    reach = symbols // 2 - 1
    flat, places = counts.reshape(-1), np.empty(codes.shape[1], np.int32)
    for i in range(codes.shape[0]):
        own, base = codes[i], np.int32(row_class[i])
        for j in range(len(own)):
            kind, value = min(max(base + np.int32(column_class[j]), 0), classes - 1), np.int64(own[j])
            symbol = value + reach if -reach <= value <= reach else symbols - 1
            # Most codes have few values, and a counter just written is slow to read: the next code has another table.
            places[j] = (j % TABLES * classes + kind) * symbols + symbol
        for j in range(len(own)):
            flat[np.uint32(places[j])] += 1


def entropy_bits(histograms: Int[Tensor, "classes symbols"]) -> float:
    """Bits of all counted codes under their class's empirical distribution."""
    totals = histograms.sum(1, keepdim=True).expand_as(histograms)
    seen = histograms > 0  # few of the values of a class
    counts = histograms[seen].double()
    return (counts * (totals[seen] / counts).log2()).sum().item()


def site_bits(codes: Integer[Tensor, "out in"], spread: Spread, share: float = 1.0) -> float:
    """Expected coded size of a site: codes, and the bytes beside them, a step and a class per row and column (of the
    columns' bytes only a `share`: other sites use them too)."""
    return code_bits(codes, spread) + SIDE_BITS * (codes.shape[0] + share * codes.shape[1])


def code_bits(codes: Integer[Tensor, "out in"], spread: Spread) -> float:
    """Entropy of the codes under their classes' own distributions, values beyond REACH written out."""
    counts = class_histograms(codes, spread)
    return entropy_bits(counts) + ESCAPE_BITS * int(counts[:, -1].sum())

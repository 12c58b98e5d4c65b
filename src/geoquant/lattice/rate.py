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
PART = 1 << 20  # codes counted at a time
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
    columns = torch.ones(codes.shape[1], device=codes.device)
    rows = torch.empty(len(codes), device=codes.device)
    step = max(1, PART // max(1, codes.shape[1]))
    for _ in range(rounds):
        weights, columns = columns.reciprocal() / len(columns), torch.zeros_like(columns)
        for start in range(0, len(codes), step):
            energy = codes[start : start + step].float().square_().add_(1e-3)
            rows[start : start + step] = found = energy @ weights
            columns += found.reciprocal() @ energy / len(rows)
    level = columns.log().mean() / 2
    row_class = torch.round((rows.log() / 2 + level - LOWEST) / WIDTH)
    column_class = torch.round((columns.log() / 2 - level) / WIDTH)
    return Spread(*(index.clamp(-127, 127).to(torch.int8) for index in (row_class, column_class)))


def class_histograms(codes: Integer[Tensor, "out in"], spread: Spread) -> Int[Tensor, "classes symbols"]:
    """Counts of the values -REACH..REACH by class, and in the last column of those beyond; on the CPU."""
    counts = torch.zeros(CLASSES, 2 * REACH + 2, dtype=torch.int64)
    _count(*(x.cpu().contiguous().numpy() for x in (codes, spread.rows, spread.columns)), counts.numpy())
    return counts


@compiled()
def _count(codes, row_class, column_class, counts):  # pragma: no cover (compiled)
    """Add every code to the count of its class and value."""
    reach = (counts.shape[1] - 2) // 2
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            value = np.int64(codes[i, j])
            symbol = value + reach if -reach <= value <= reach else 2 * reach + 1
            counts[min(max(np.int64(row_class[i]) + column_class[j], 0), counts.shape[0] - 1), symbol] += 1


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

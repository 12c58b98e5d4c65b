"""Magnitudes of a stream of activations in bins so fine that clips and tails can be read from them afterwards.

Bins follow the float32 format: every octave from 2^-32 to 2^32 is cut into 512 equal parts, so a bin is at most 1/512
of the values in it wide, whatever the units, and finding it is one shift of the bits. What is smaller lies in the first
bin, what is larger in the last. Histograms of two sets of tokens add.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["BINS", "LARGEST", "WIDTH", "Histogram", "collect", "edges"]

LOWEST, OCTAVES, PARTS = -32, 64, 9  # 2^PARTS bins per octave
BINS = OCTAVES << PARTS
WIDTH = 2.0**-PARTS  # of a bin, at most, relative to the values in it
LARGEST = 1000  # values kept as they are
_SHIFT = 23 - PARTS  # of float32's 23 bits of mantissa
_FIRST = (127 + LOWEST) << PARTS


@dataclass(frozen=True)
class Histogram:
    """Sums over the values x of a tensor, in float64; all add exactly, up to the rounding of a float64 sum.

    counts:  (2, BINS) values by |x|; those below zero, and the others.
    sums:    (BINS,) sum of |x|. squares: (BINS,) sum of x^2. With them what a quantizer does to the values of a bin
             that all get one code is known exactly, whatever the width of the bin.
    powers:  (4,) sums of x, x^2, x^3, x^4 over all values.
    largest: the `LARGEST` largest |x| (all, where there are fewer), largest first.
    """

    counts: Float[Tensor, "2 bins"]
    sums: Float[Tensor, " bins"]
    squares: Float[Tensor, " bins"]
    powers: Float[Tensor, " 4"]
    largest: Float[Tensor, " k"]

    def __add__(self, other: Histogram) -> Histogram:
        largest = torch.cat([self.largest, other.largest]).sort(descending=True).values[:LARGEST]
        return Histogram(
            self.counts + other.counts,
            self.sums + other.sums,
            self.squares + other.squares,
            self.powers + other.powers,
            largest,
        )

    @property
    def count(self) -> int:
        """How many values."""
        return int(self.counts.sum())

    @cached_property
    def occupied(self) -> Int[Tensor, " m"]:
        """The bins that hold values, in order."""
        return self.counts.sum(0).nonzero()[:, 0]

    @property
    def means(self) -> Float[Tensor, " m"]:
        """Mean |x| of each occupied bin."""
        return self.sums[self.occupied] / self.counts.sum(0)[self.occupied]

    def quantile(self, share: float) -> float:
        """|x| below which a share of the values lies: exact up to the width of a bin, never above the largest."""
        if not 0 < share <= 1:
            raise ValueError(f"0 < share <= 1 must hold, got {share}")
        counts = self.counts.sum(0)[self.occupied]
        below = counts.cumsum(0)
        wanted = share * below[-1]
        place = int(torch.searchsorted(below, wanted).clamp_max(len(below) - 1))
        if self.occupied[place] == 0:  # zeros, mostly
            return self.means[0].item()
        low, high = (edges()[self.occupied[place] + step].item() for step in (0, 1))
        part = 1 - ((below[place] - wanted) / counts[place]).item()
        return min(low + part * (high - low), self.largest[0].item())

    def above(self, limit: float, sign: int = 1) -> float:
        """How many values x, or -x for a sign of -1, lie above the limit; of the bin that holds it, an even part.

        What lies in the first bin counts as zero.
        """
        below, other = self.counts if sign > 0 else self.counts.flip(0)
        return _above(other, limit) if limit >= 0 else (self.counts.sum() - _above(below, -limit)).item()


def edges() -> Float[Tensor, " bins+1"]:
    """Where the bins begin and end, float64. The first begins at 0."""
    bits = (torch.arange(BINS + 1, dtype=torch.int32) + _FIRST) << _SHIFT
    found = bits.view(torch.float32).double()
    found[0] = 0.0
    return found


def _above(counts: Float[Tensor, " bins"], limit: float) -> float:
    """How many values lie above the limit."""
    borders = edges()
    place = min(int(torch.searchsorted(borders, limit, right=True)) - 1, BINS - 1)
    part = (borders[place + 1] - limit) / (borders[place + 1] - borders[place])
    part = part.clamp(0, 1) if place else 0.0
    return (counts[place + 1 :].sum() + counts[place] * part).item()


def collect(values: Float[Tensor, "*any"]) -> Histogram:
    """The histogram of all numbers of a tensor, taken as float32.

    Raises ValueError for an empty tensor and for values that are not finite.
    """
    if values.numel() == 0:
        raise ValueError("a histogram of no values")
    x = values.detach().float().flatten()
    size = x.abs()
    place = ((size.view(torch.int32) >> _SHIFT) - _FIRST).clamp_(0, BINS - 1).long()
    counts = torch.bincount(place + BINS * (x >= 0), minlength=2 * BINS).view(2, BINS).double()
    size, x = size.double(), x.double()
    second = x * x
    powers = torch.stack([x.sum(), second.sum(), (second * x).sum(), (second * second).sum()])
    if not powers.isfinite().all():
        raise ValueError("a value is not finite")
    largest = size.topk(min(LARGEST, len(size))).values
    sums = torch.bincount(place, weights=size, minlength=BINS)
    squares = torch.bincount(place, weights=second, minlength=BINS)
    return Histogram(counts.cpu(), sums.cpu(), squares.cpu(), powers.cpu(), largest.cpu())

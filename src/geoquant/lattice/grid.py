"""The box grid: b-bit integer codes with one scale (and zero point) per row and group of input columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Grid", "dequantize", "quantize_with_scales", "search_scales"]

# Steps are stored in bfloat16: its 8 significant bits survive a reader's cast to bf16, fp16 or fp32 unchanged,
# so codes solved against the rounded step mean the same numbers in every runtime.
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """Intent: which numbers a weight may take. Symmetric codes lie in [-2^(b-1), 2^(b-1)-1], asymmetric in [0, 2^b-1]."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2..8, got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Number of groups of a row with `columns` weights; the last one may be shorter."""
        return -(-columns // self.group_size)

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight: codes, 16-bit scales and, if asymmetric, b-bit zero points."""
        side = 16 + (0 if self.symmetric else self.bits)
        return self.bits + side * self.groups(columns) / columns

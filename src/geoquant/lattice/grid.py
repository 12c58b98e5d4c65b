"""The box grid: b-bit integer codes with one scale (and zero point) per row and group of input columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from geoquant.lattice.kernel import best_symmetric
from geoquant.threads import in_parts

__all__ = ["SCALE_DTYPE", "Grid", "dequantize", "round_to_grid", "search_scales"]

# Steps are stored in bfloat16: its 8 significant bits survive a reader's cast to bf16, fp16 or fp32 unchanged,
# so codes solved against the rounded step mean the same numbers in every runtime.
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """Intent: which numbers a weight may take.

    Symmetric codes lie in [-2^(b-1), 2^(b-1)-1], asymmetric in [0, 2^b-1].
    """

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


# Steps tried, as fractions of the step whose box just reaches the largest weight. Each try is followed by the
# closed-form best step for its codes, and the best of all by one more rounding, so a coarse list is enough.
SHRINK = (1.0, 0.9, 0.8, 0.72, 0.64, 0.56)


def search_scales(
    weight: Float[Tensor, "columns rows"], importance: Float[Tensor, " columns"], grid: Grid
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"] | None]:
    """Step (and zero point) per row that minimise `sum_j importance_j (w_j - q_j)^2` over one group of columns.

    Weights come transposed, one row of the tensor per column of the layer. For codes z the best step is
    `a/b` with `a = sum h w z`, `b = sum h z^2`, and its error is `sum h w^2 - a^2/b`: each try therefore costs one
    rounding and two weighted sums. A symmetric grid has one more code below zero than above, so both signs of
    the step are tried. Steps are rounded to bfloat16, the precision in which they are stored; up to that rounding
    the error is never above that of the min-max steps `max|w| / 2^(b-1)` and `max|w| / (2^(b-1) - 1)`.
    Where no column matters (all importances zero) or one is not finite, all columns count the same.
    """
    importance = importance / importance.max()
    importance = torch.where(importance.isfinite().all(), importance, 1.0)
    # A column that does not matter must still be reproduced if nothing else decides.
    importance = importance.clamp_min(1e-9)[:, None]
    return _symmetric(weight, importance, grid) if grid.symmetric else _asymmetric(weight, importance, grid)


def _symmetric(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, None]:
    # Inverse steps to try, times the largest weight; the last is the one step that clips on neither side.
    shares = [sign * -grid.lowest / shrink for shrink in SHRINK for sign in (1.0, -1.0)] + [float(grid.highest)]
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        scale = torch.empty(weight.shape[1])
        arrays = (weight.contiguous(), importance[:, 0].contiguous(), torch.tensor(shares))
        given = [x.numpy() for x in arrays]
        given += [np.float32(grid.lowest), np.float32(grid.highest), scale.numpy()]
        in_parts(lambda own: best_symmetric(*given, own.start, own.stop), weight.shape[1])
        return _stored(scale), None
    weighted = weight * importance
    largest = weight.abs().amax(0).clamp_min(1e-12)
    best = torch.full_like(largest, -1.0)
    scale = largest / -grid.lowest
    codes = torch.empty_like(weight)
    for attempt in range(len(shares) + 1):
        torch.mul(weight, shares[attempt] / largest if attempt < len(shares) else scale.reciprocal(), out=codes)
        codes.round_().clamp_(grid.lowest, grid.highest)
        a = (weighted * codes).sum(0)
        b = (codes.square_() * importance).sum(0)
        gain = torch.where(b > 0, a * a / b.clamp_min(1e-30), 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better & (b > 0), a / b.clamp_min(1e-30), scale)
    return _stored(scale), None


def _asymmetric(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(0).clamp_max(0.0), weight.amax(0).clamp_min(0.0)
    span = (high - low).clamp_min(1e-12)
    best = torch.full_like(span, torch.inf)
    scale = _stored(span / grid.highest)
    zero = (-low / scale).round_().clamp_(0, grid.highest)
    for shrink in (*SHRINK, None):
        if shrink is None:
            step, point = scale, zero
        else:
            step = _stored(span * shrink / grid.highest)
            point = (-low * shrink / step).round_().clamp_(0, grid.highest)
        codes = (weight / step).round_().add_(point).clamp_(0, grid.highest).sub_(point)
        a = (weight * codes * importance).sum(0)
        b = (codes.square() * importance).sum(0)
        refit = _stored(torch.where((a > 0) & (b > 0), a / b.clamp_min(1e-30), step))
        error = ((codes * refit - weight).square_() * importance).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, refit, scale), torch.where(better, point, zero)
    return scale, zero


def _stored(scale: Tensor) -> Tensor:
    """The value a reader will see, never zero."""
    rounded = scale.to(SCALE_DTYPE).to(scale.dtype)
    tiny = torch.finfo(SCALE_DTYPE).tiny
    return torch.where(rounded.abs() < tiny, tiny, rounded)


def round_to_grid(
    weight: Float[Tensor, "columns rows"], scale: Tensor, zero: Tensor | None, grid: Grid
) -> tuple[Float[Tensor, "columns rows"], Float[Tensor, "columns rows"]]:
    """Nearest codes (as float) inside the box, and the nearest codes had there been no box."""
    free = (weight / scale).round_()
    if zero is not None:
        free += zero
    return free.clamp(grid.lowest, grid.highest), free


def dequantize(
    codes: Integer[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    zero_points: Integer[Tensor, "out groups"] | None,
    group_size: int,
) -> Float[Tensor, "out in"]:
    """`s * (z - zero_point)` in float32; the last group may be shorter than `group_size`."""
    columns = codes.shape[1]

    def spread(per_group: Tensor) -> Tensor:
        return per_group.float().repeat_interleave(group_size, dim=1)[:, :columns]

    values = codes.float()
    if zero_points is not None:
        values -= spread(zero_points)
    return values.mul_(spread(scales))

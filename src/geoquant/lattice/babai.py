"""Babai's nearest plane on the box grid: GPTQ with every choice made explicit.

Column after column, in the given order: round to the nearest code inside the box, then move the columns that are
still free to the minimiser of `(w-q)^T A (w-q)` given what is fixed. Equal to GPTQ in that order
(Frantar et al. 2022; Chen et al. 2025, arXiv 2507.18553).

Work is blocked twice: rank-one updates inside a strip of columns, one matrix product per strip for its panel,
one per panel for everything behind it, so that almost all flops are in matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.grid import Grid, search_scales

__all__ = ["BoxedCodes", "boxed_babai"]

PANEL = 64
STRIP = 16


@dataclass(frozen=True)
class BoxedCodes:
    """Codes (in, out) in original column order, steps and zero points (groups, out), free columns (k, out) in the order
    of processing."""

    codes: Integer[Tensor, "in out"]
    scales: Float[Tensor, "groups out"]
    zeros: Float[Tensor, "groups out"] | None
    free: Float[Tensor, "k out"]
    clipped: Float[Tensor, " out"]  # number of codes that the box changed, per row


def boxed_babai(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    grid: Grid,
    importance: Float[Tensor, " in"],
    *,
    free: int = 0,
    scales: Float[Tensor, "groups out"] | None = None,
    zeros: Float[Tensor, "groups out"] | None = None,
) -> BoxedCodes:
    """Quantize all columns but the last `free` of `order`, which end as continuous values that absorb every error.

    factor:     `U` of `compensation_factor`, in processing order.
    importance: weights of the scale search per column (original order); usually diag(A).
    scales:     fixed steps (and `zeros`); when None, a group's step is searched on the updated weights of its
                columns, free ones left out, at the moment the recursion first touches the group.

    Works in the dtype of `weight`, which all floating arguments share.
    """
    rows, columns = weight.shape
    count = columns - free
    group_of = order // grid.group_size
    groups = grid.groups(columns)
    # Transposed, so that one column of the layer is one contiguous row of memory.
    work = weight.T[order].contiguous()
    like = {"dtype": weight.dtype, "device": weight.device}
    codes = torch.zeros(columns, rows, dtype=torch.int8 if grid.symmetric else torch.uint8, device=weight.device)
    searched = scales is None
    if searched:
        scales = torch.ones(groups, rows, **like)
        zeros = None if grid.symmetric else torch.zeros(groups, rows, **like)
    clipped = torch.zeros(rows, **like)
    # Free columns are no concern of the grid: their weights, often the largest, must not stretch its steps.
    members = [torch.nonzero(group_of[:count] == group).flatten() for group in range(groups)]
    started = [not searched] * groups
    group_list = group_of.tolist()
    pivot = factor.diagonal().reciprocal().tolist()
    errors = torch.empty(PANEL, rows, **like)
    unboxed = torch.empty(PANEL, rows, **like)
    value = torch.empty(rows, **like)
    # Views made once: slicing a tensor costs as much as a short vector operation.
    work_of, errors_of, unboxed_of = work.unbind(0), errors.unbind(0), unboxed.unbind(0)
    scale_of, zero_of = list(scales.unbind(0)), None if zeros is None else list(zeros.unbind(0))

    for panel in range(0, count, PANEL):
        panel_end = min(panel + PANEL, count)
        for strip in range(panel, panel_end, STRIP):
            strip_end = min(strip + STRIP, panel_end)
            for j in range(strip, strip_end):
                group = group_list[j]
                if not started[group]:
                    started[group] = True
                    block = _current(work, factor, errors, members[group], panel, strip, j, panel_end, strip_end)
                    scale, zero = search_scales(block, importance[order[members[group]]], grid)
                    scale_of[group].copy_(scale)
                    if zero is not None:
                        zero_of[group].copy_(zero)
                free_code, error = unboxed_of[j - panel], errors_of[j - panel]
                torch.div(work_of[j], scale_of[group], out=free_code).round_()
                if zero_of is None:
                    torch.clamp(free_code, grid.lowest, grid.highest, out=value)
                else:
                    free_code += zero_of[group]
                    torch.clamp(free_code, grid.lowest, grid.highest, out=value).sub_(zero_of[group])
                torch.addcmul(work_of[j], value, scale_of[group], value=-1.0, out=error).mul_(pivot[j])
                if j + 1 < strip_end:
                    work[j + 1 : strip_end].addr_(factor[j, j + 1 : strip_end], error, alpha=-1.0)
            if strip_end < panel_end:
                done = errors[strip - panel : strip_end - panel]
                work[strip_end:panel_end].addmm_(factor[strip:strip_end, strip_end:panel_end].T, done, alpha=-1.0)
        found = unboxed[: panel_end - panel]
        boxed = found.clamp(grid.lowest, grid.highest)
        clipped += (boxed != found).sum(0)
        codes[order[panel:panel_end]] = boxed.to(codes.dtype)
        if panel_end < columns:
            done = errors[: panel_end - panel]
            work[panel_end:].addmm_(factor[panel:panel_end, panel_end:].T, done, alpha=-1.0)
    return BoxedCodes(codes, scales, zeros, work[count:], clipped)


def _current(
    work: Tensor,
    factor: Tensor,
    errors: Tensor,
    members: Tensor,
    panel: int,
    strip: int,
    j: int,
    panel_end: int,
    strip_end: int,
) -> Tensor:
    """Up-to-date weights of a group's columns: those outside the strip still lack the updates that are pending."""
    block = work[members]
    # Columns behind the panel lack the whole panel so far; columns of later strips lack only this strip.
    behind, later = members >= panel_end, (members >= strip_end) & (members < panel_end)
    for lacking, first in ((behind, panel), (later, strip)):
        if j > first and lacking.any():
            pending = factor[first:j][:, members[lacking]].T @ errors[first - panel : j - panel]
            block[lacking] -= pending
    return block

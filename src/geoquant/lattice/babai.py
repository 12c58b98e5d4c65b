"""Babai's nearest plane on the box grid: GPTQ with every choice made explicit.

Column after column, in the given order: round to the nearest code inside the box, then move the columns that are
still free to the minimiser of `(w-q)^T A (w-q)` given what is fixed. Equal to GPTQ in that order
(Frantar et al. 2022; Chen et al. 2025, arXiv 2507.18553).

Work is blocked: columns of a panel update each other one by one (compiled on a CPU in float32, torch operations
elsewhere), and one matrix product per panel brings everything behind it up to date. A panel is cut where a group
begins whose steps are to be searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.grid import Grid, search_scales
from geoquant.lattice.kernel import boxed_panel
from geoquant.threads import in_parts

__all__ = ["BoxedCodes", "boxed_babai"]

PANEL = 64


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
    pivot = factor.diagonal().reciprocal()
    errors, unboxed = torch.empty(PANEL, rows, **like), torch.empty(PANEL, rows, **like)
    run = _compiled if work.device.type == "cpu" and work.dtype == torch.float32 else _plain

    for panel in range(0, count, PANEL):
        panel_end = min(panel + PANEL, count)
        part = slice(panel, panel_end)
        found, lost = unboxed[: panel_end - panel], errors[: panel_end - panel]
        j = panel
        while j < panel_end:
            group = group_list[j]
            if not started[group]:
                started[group] = True
                block = _current(work, factor, errors, members[group], panel, j, panel_end)
                scale, zero = search_scales(block, importance[order[members[group]]], grid)
                scales[group] = scale
                if zero is not None:
                    zeros[group] = zero
            stop = next((k for k in range(j + 1, panel_end) if not started[group_list[k]]), panel_end)
            span = slice(j - panel, stop - panel)
            points = None if zeros is None else zeros[group_of[part]]
            run(work[part], found, lost, scales[group_of[part]], points, pivot[part], factor[part, part], span, grid)
            j = stop
        boxed = found.clamp(grid.lowest, grid.highest)
        clipped += (boxed != found).sum(0)
        codes[order[part]] = boxed.to(codes.dtype)
        if panel_end < columns:
            work[panel_end:].addmm_(factor[part, panel_end:].T, lost, alpha=-1.0)
    return BoxedCodes(codes, scales, zeros, work[count:], clipped)


def _compiled(
    work: Tensor,
    unboxed: Tensor,
    errors: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    pivot: Tensor,
    factor: Tensor,
    span: slice,
    grid: Grid,
) -> None:
    zeros = work.new_empty(0, 0) if zeros is None else zeros
    arrays = (work, unboxed, errors, scales, zeros, pivot, factor.contiguous())
    given = [x.numpy() for x in arrays]
    given += [span.start, span.stop, np.float32(grid.lowest), np.float32(grid.highest)]
    in_parts(lambda own: boxed_panel(*given, own.start, own.stop), work.shape[1])


def _plain(
    work: Tensor,
    unboxed: Tensor,
    errors: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    pivot: Tensor,
    factor: Tensor,
    span: slice,
    grid: Grid,
) -> None:
    """Columns `span` of a panel, all of whose later columns are kept up to date; see `kernel.boxed_panel`."""
    for j in range(span.start, span.stop):
        torch.div(work[j], scales[j], out=unboxed[j]).round_()
        if zeros is not None:
            unboxed[j] += zeros[j]
        value = unboxed[j].clamp(grid.lowest, grid.highest)
        if zeros is not None:
            value -= zeros[j]
        torch.addcmul(work[j], value, scales[j], value=-1.0, out=errors[j]).mul_(pivot[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)


def _current(
    work: Tensor, factor: Tensor, errors: Tensor, members: Tensor, panel: int, j: int, panel_end: int
) -> Tensor:
    """Up-to-date weights of a group's columns: those behind the panel still lack the updates of its columns so far."""
    block = work[members]
    lacking = members >= panel_end
    if j > panel and lacking.any():
        block[lacking] -= factor[panel:j][:, members[lacking]].T @ errors[: j - panel]
    return block

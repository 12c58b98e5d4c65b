"""K-best: Babai with M survivors. Of all prefixes of codes it keeps the M of least error, column after column.

Every survivor is followed by its two nearest codes inside the box; of these 2 M prefixes the M with the least partial
sum of `r_j^2 (u_j - z_j)^2 s_j^2` survive, which is exact where M covers all of them, and Babai where M = 1. The
M-algorithm (Anderson and Mohan 1984), known from the detection of signals as K-best sphere decoding.

A survivor may be dropped whose end would have been better, Babai's own path too: who wants to be sure compares.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["kbest"]

PANEL = 32
BUDGET = 1 << 24  # numbers that the survivors of a part of the rows may hold


def kbest(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    steps: Float[Tensor, "out in"],
    survivors: int,
    limits: tuple[Int[Tensor, "out in"], Int[Tensor, "out in"]] | None = None,
) -> Int[Tensor, "out in"]:
    """Codes z (int32) with `q_ij = steps_ij z_ij`, rows alone, a part of them at a time.

    factor: `U` of `compensation_factor`, in processing order. steps and limits (least and largest code; None: no box)
    in the original order of the columns. Work grows with `survivors`, which is at least one.
    """
    if survivors < 1:
        raise ValueError(f"survivors must be at least 1, got {survivors}")
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, BUDGET // survivors // len(order))):
        lowest, highest = (None, None) if limits is None else (x[rows].T[order].to(weight.dtype) for x in limits)
        work = weight[rows].T[order].to(factor.dtype)
        found = _search(work, factor, steps[rows].T[order].to(factor.dtype), survivors, lowest, highest)
        codes[rows[:, None], order] = found.T.to(torch.int32)
    return codes


def _search(
    work: Float[Tensor, "in rows"],
    factor: Float[Tensor, "in in"],
    steps: Float[Tensor, "in rows"],
    survivors: int,
    lowest: Tensor | None,
    highest: Tensor | None,
) -> Float[Tensor, "in rows"]:
    """Everything in processing order; what belongs to a survivor has it as its first dimension."""
    columns, rows = work.shape
    lengths = factor.diagonal().reciprocal().tolist()
    like = {"dtype": work.dtype, "device": work.device}
    # A survivor that is none yet is infinitely bad.
    total = torch.full((survivors, rows), torch.inf, **like)
    total[0] = 0.0
    work = work.expand(survivors, columns, rows).contiguous()
    chosen = torch.empty(columns, survivors, rows, **like)  # codes and their survivors' parents, to walk back from
    parents = torch.empty(columns, survivors, rows, dtype=torch.int64, device=work.device)
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        panel = work[:, start:stop].clone()
        errors = torch.zeros(survivors, stop - start, rows, **like)
        origin = torch.arange(survivors, device=work.device)[:, None].expand(survivors, rows)
        for j in range(start, stop):
            here, length = j - start, lengths[j]
            centre = panel[:, here] / steps[j]
            first = torch.round(centre)
            if lowest is not None:
                first = first.clamp(lowest[j], highest[j])
            aside = torch.where(centre < first, -1.0, 1.0)
            second = first + aside
            if lowest is not None:  # a centre beyond the box has its second code inside
                second = torch.where((second < lowest[j]) | (second > highest[j]), first - aside, second)
            codes = torch.cat([first, second])
            costs = torch.cat([total, total]) + (torch.cat([centre, centre]) - codes).mul_(steps[j] * length).square_()
            total, pick = torch.topk(costs, survivors, 0, largest=False)
            parent = pick % survivors
            code = codes.gather(0, pick)
            chosen[j], parents[j] = code, parent
            origin = origin.gather(0, parent)
            error = (panel[:, here].gather(0, parent) - code * steps[j]) * length
            rest = parent[:, None].expand(survivors, stop - j - 1, rows)
            panel[:, here + 1 :] = panel[:, here + 1 :].gather(0, rest)
            panel[:, here + 1 :] -= factor[j, j + 1 : stop, None] * error[:, None]
            errors[:, :here] = errors[:, :here].gather(0, parent[:, None].expand(survivors, here, rows))
            errors[:, here] = error
        if stop < columns:
            tail = work[:, stop:].gather(0, origin[:, None].expand(survivors, columns - stop, rows))
            work[:, stop:] = tail - factor[start:stop, stop:].T @ errors
    # `topk` is sorted: the first survivor is the best.
    result = torch.empty(columns, rows, **like)
    at = torch.zeros(1, rows, dtype=torch.int64, device=work.device)
    for j in range(columns - 1, -1, -1):
        result[j] = chosen[j].gather(0, at)[0]
        at = parents[j].gather(0, at)
    return result

"""Coordinate descent: cycles of single-code changes, each the best for its code while all others stay.

With errors `E = W - Q` the form `F = tr(G E A E^T)` changes by `q s^2 d^2 - 2 g s d` when code (i, j) moves by d
steps of size s, where `g = (G E A)_ij` and `q = G_ii A_jj`: the best d is the integer nearest to `g / (q s)`, inside
the box if there is one. Every change lowers F, so cycles end. Where bits have a price (lattice/priced) the price of the
change is added. G has blocks of rows, so that the codes of a block see each other; blocks of one row are strangers.

Cycles go panel by panel: one matrix product for all rows, then a compiled pass over the panel's codes. It finds what
is better in every single code, not the closest point: in GPTQ's box also known as QuantEase (Behdin et al. 2023).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.compiled import compiled
from geoquant.lattice.prices import Prices

__all__ = ["descend"]

PANEL = 64
ROWS = 1 << 12


def descend(
    weight: Float[Tensor, "out in"],
    codes: Int[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    row_steps: Float[Tensor, "out groups"],
    column_steps: Float[Tensor, " in"],
    *,
    curvature: Float[Tensor, "blocks size size"] | None = None,
    sizes: tuple[int, ...] | None = None,
    limits: tuple[Int[Tensor, "out groups"], Int[Tensor, "out groups"]] | None = None,
    prices: Prices | None = None,
    mu: float = 0.0,
    group_size: int | None = None,
    cycles: int = 3,
) -> tuple[Int[Tensor, "out in"], int]:
    """Better codes z (int32), and how often a code was changed; stops early when a cycle changes none.

    `q_ij = row_steps_i,g(j) column_steps_j z_ij`, with g(j) the group of a column, of `group_size` columns each; None:
    all are one group. metric: A, as damped as the form that is to fall. curvature, sizes: G in blocks of rows, as in
    `RowMetric`; None: strangers. limits: least and largest code; None: no box. mu: price of a bit in units of F.

    Compiled, on the CPU, in single precision.
    """
    if len(weight) > ROWS and curvature is None and prices is None:
        parts = []
        for start in range(0, len(weight), ROWS):
            part = slice(start, start + ROWS)
            box = limits and tuple(limit[part] for limit in limits)
            given = (weight[part], codes[part], metric, row_steps[part], column_steps)
            parts.append(descend(*given, limits=box, group_size=group_size, cycles=cycles))
        return torch.cat([found for found, _ in parts]), sum(changes for _, changes in parts)
    device, dtype = weight.device, torch.float32
    metric, rows = metric.cpu().to(dtype), len(weight)
    if curvature is None:
        curvature, sizes = metric.new_ones(rows, 1, 1), (1,) * rows
    groups = torch.arange(weight.shape[1]) // (group_size or weight.shape[1])
    steps = row_steps.cpu().to(dtype)[:, groups] * column_steps.cpu().to(dtype)
    codes = codes.cpu().to(torch.int32).clone()
    errors = weight.cpu().to(dtype) - steps * codes
    wide = torch.full((rows, 1), 1 << 30, dtype=torch.int32)
    lowest, highest = (-wide, wide) if limits is None else (limit.cpu().to(torch.int32) for limit in limits)
    if prices is None:
        bits = np.zeros((1, 1), dtype=np.float32)
        row_class, column_class = np.zeros(rows, dtype=np.int64), np.zeros(weight.shape[1], dtype=np.int64)
    else:
        bits = (mu * prices.bits.cpu().float()).numpy()
        classes = (prices.spread.rows, prices.spread.columns)
        row_class, column_class = (x.cpu().numpy().astype(np.int64) for x in classes)
    curvature, sizes_array = curvature.cpu().to(dtype).contiguous().numpy(), np.array(sizes)
    box_groups = groups if limits is not None else torch.zeros_like(groups)
    total = 0
    for _ in range(cycles):
        changes = 0
        for start in range(0, weight.shape[1], PANEL):
            part = slice(start, min(start + PANEL, weight.shape[1]))
            inside = errors @ metric[:, part]
            own, own_steps = codes[:, part].contiguous(), steps[:, part].contiguous()
            limit = [side[:, box_groups[part]].contiguous().numpy() for side in (lowest, highest)]
            before = own.clone()
            changes += _panel(
                inside.numpy(),
                own.numpy(),
                own_steps.numpy(),
                metric[part, part].contiguous().numpy(),
                curvature,
                sizes_array,
                *limit,
                bits,
                row_class,
                column_class[part],
            )
            errors[:, part] -= own_steps * (own - before)
            codes[:, part] = own
        total += changes
        if not changes:
            break
    return codes.to(device), total


@compiled()
def _panel(
    inside, codes, steps, metric, curvature, sizes, lowest, highest, bits, row_class, column_class
):  # pragma: no cover (compiled)
    """One cycle over a panel; inside = (E A) of its columns. Returns the number of changes."""
    columns, classes, last_size = codes.shape[1], bits.shape[0], bits.shape[1] - 1
    gradient = np.empty((curvature.shape[1], columns), dtype=inside.dtype)
    changes, first = 0, 0
    for block in range(len(sizes)):
        size = sizes[block]
        for i in range(size):
            for j in range(columns):
                gradient[i, j] = 0
            for k in range(size):
                share = curvature[block, i, k]
                for j in range(columns):
                    gradient[i, j] += share * inside[first + k, j]
        for j in range(columns):
            for i in range(size):
                row = first + i
                own, step = codes[row, j], steps[row, j]
                square = curvature[block, i, i] * metric[j, j] * step * step
                if not square > 0:
                    continue
                wanted = gradient[i, j] * step / square  # in steps
                if not abs(wanted) < 1 << 29:
                    continue
                table = bits[min(max(row_class[row] + column_class[j], 0), classes - 1)]
                paid = table[min(abs(own), last_size)]
                best, gain = 0, 0.0
                nearest = min(max(own + int(np.rint(wanted)), lowest[row, j]), highest[row, j])
                # The nearest, its neighbour on the side of zero, and one step to zero from where we are.
                for candidate in (nearest, nearest - np.sign(nearest), own - np.sign(own)):
                    if candidate < lowest[row, j] or candidate > highest[row, j]:
                        continue
                    move = candidate - own
                    lower = square * move * (2 * wanted - move) + paid - table[min(abs(candidate), last_size)]
                    if lower > gain:
                        best, gain = move, lower
                # What rounding of the sums could have made is no gain.
                if best == 0 or gain <= 1e-5 * square:
                    continue
                codes[row, j] = own + best
                changes += 1
                for k in range(size):
                    share = curvature[block, k, i] * best * step
                    for other in range(columns):
                        gradient[k, other] -= share * metric[j, other]
        first += size
    return changes

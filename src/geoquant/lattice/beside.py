"""Babai's recursion on the unbounded lattice, compiled: a chunk of the rows at a time, small enough for the caches.

What `unboxed.unboxed_babai` computes, for the CPU in single precision. A chunk is made of groups of blocks side by
side, as `lanes` wants them, which torch's threads share. How blocks are grouped changes no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.lanes import LANES, SUB, pack, panel, unpack
from geoquant.lattice.rows import RowMetric, block_sizes
from geoquant.threads import in_parts

__all__ = ["Pulls", "side_by_side", "smallest"]

PANEL = 64
HEIGHT = 64  # rows of a block where they need not know of each other
ROWS = 1024  # of a chunk, for each thread


@dataclass(frozen=True)
class Pulls:
    """The centre of row i and column j is divided by `1 + rows_i columns_j` before it is rounded, but goes no further
    than one step; original order."""

    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]


@dataclass(frozen=True)
class Groups:
    """Neighbouring blocks, some of them side by side in each group.

    blocks: of each group. own: rows of all of them. rows: (slots,) the row in each slot, counted from the first of
    `own`, one group after another; -1 where there is none.
    """

    blocks: tuple[range, ...]
    own: slice
    rows: np.ndarray

    def each(self, run: Callable[[int, int, int], None]) -> None:
        """`run` on the index, first slot and last of every group, on one of the threads."""
        count = len(self.blocks)
        slots = len(self.rows) // count

        def some(part: slice) -> None:
            for index in range(count)[part]:
                run(index, index * slots, (index + 1) * slots)

        in_parts(some, count)

    def feedback(self, blocks: Float[Tensor, "blocks size size"] | None, height: int) -> list[np.ndarray | None]:
        """Of each group, its blocks side by side and filled up with zeros."""
        if blocks is None:
            return [None] * len(self.blocks)
        found = blocks.new_zeros(len(self.blocks), height, height, LANES)
        for into, own in zip(found, self.blocks):
            into[: blocks.shape[1], : blocks.shape[1], : len(own)] = blocks[own.start : own.stop].permute(1, 2, 0)
        return list(found.flatten(2).numpy())


def side_by_side(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    row_steps: Float[Tensor, " out"],
    column_steps: Float[Tensor, " in"],
    rows: RowMetric | None,
    pulls: Pulls | None,
) -> Integer[Tensor, "out in"]:
    """Arguments and codes of `unboxed_babai`."""
    columns, lengths, threads = len(order), basis.diagonal(), torch.get_num_threads()
    steps, row_steps, weight = column_steps[order].float().numpy(), row_steps.float(), weight.float().contiguous()
    column_pulls = None if pulls is None else pulls.columns[order].float().numpy()
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(columns)).numpy()
    if rows is None or rows.strangers:
        height = min(HEIGHT, SUB * max(1, -(-len(weight) // (SUB * LANES * threads))))  # some for every thread
        sizes, blocks = block_sizes([len(weight)], height), None
    else:
        sizes, blocks = rows.sizes, rows.feedback(row_steps).float()
        height = blocks.shape[1] + -blocks.shape[1] % SUB
    parts = [slice(first, min(first + PANEL, columns)) for first in range(0, columns, PANEL)]
    shares = [basis[: part.stop, part] / lengths[part] for part in parts]
    found, memory = [torch.empty(0, columns, dtype=torch.int8)], torch.empty(2, columns, 0)
    for groups in _chunks(sizes, height, threads):
        if memory.shape[2] != len(groups.rows):
            memory = torch.empty(2, columns, len(groups.rows))
        own, feedback = groups.own, groups.feedback(blocks, height)
        given, units, (centres, errors) = weight[own].numpy(), row_steps[own].numpy(), memory
        codes, work = centres.numpy(), errors.numpy()
        pull = None if pulls is None else pulls.rows[own].float().numpy()[np.maximum(groups.rows, 0)]
        groups.each(lambda _, *span: pack(given, units, groups.rows, places, work, *span))  # noqa: B023
        for part, share in zip(parts, shares):
            first = part.start
            torch.addmm(errors[part], share[:first].T, errors[:first], out=centres[part])
            moved = codes[part], work[part], steps[part], share[first:].numpy()
            column = None if pulls is None else column_pulls[part]
            groups.each(lambda index, *span: panel(*moved, feedback[index], *span, pull, column))  # noqa: B023
        result = torch.empty(own.stop - own.start, columns, dtype=smallest(centres))
        groups.each(lambda _, *span: unpack(codes, groups.rows, places, result.numpy(), *span))  # noqa: B023
        found.append(result)
    return torch.cat(found)


def smallest(codes: Tensor) -> torch.dtype:
    """The smallest integer type that holds the codes."""
    largest = max(abs(float(code)) for code in codes.aminmax()) if codes.numel() else 0
    return torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32


def _chunks(sizes: tuple[int, ...], height: int, threads: int) -> Iterator[Groups]:
    """As few chunks as can be, of like numbers of blocks; each of at most ROWS rows, or one group, for every thread.

    sizes: rows of each block. height: slots of each block.
    """
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    blocks = LANES * threads * max(1, ROWS // (height * LANES))  # of a chunk, at most
    for mine in _evenly(range(len(sizes)), -(-len(sizes) // blocks)):
        groups = _evenly(mine, -(-len(mine) // LANES))  # no more for more threads: empty lanes cost products
        rows = np.full((len(groups), height, LANES), -1, dtype=np.int64)
        for group, own in enumerate(groups):
            for lane, block in enumerate(own):
                rows[group, : sizes[block], lane] = np.arange(starts[block], starts[block + 1]) - starts[mine.start]
        yield Groups(tuple(groups), slice(int(starts[mine.start]), int(starts[mine.stop])), rows.reshape(-1))


def _evenly(items: range, parts: int) -> list[range]:
    bounds = [len(items) * part // max(1, parts) for part in range(parts + 1)]
    return [items[first:last] for first, last in pairwise(bounds)]

"""GGUF blocks that hold our codes as they are: 32 weights of a row, their step, and for some types an offset.

    type   bytes of a block                                     a weight
    Q4_0   d f16, 16 bytes of nibbles                           d * (q - 8)
    Q4_1   d f16, m f16, 16 bytes of nibbles                    d * q + m
    Q5_0   d f16, 4 bytes of fifth bits, 16 bytes of nibbles    d * (q - 16)
    Q5_1   d f16, m f16, 4 bytes of fifth bits, 16 bytes ...    d * q + m
    Q8_0   d f16, 32 signed bytes                               d * q

Weight j of a block has its low four bits in the low half of byte j (j < 16) or the high half of byte j - 16, and its
fifth bit at bit j of the four bytes. All numbers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from geoquant.errors import UserError
from geoquant.export.steps import Rounding, half_steps
from geoquant.lattice.grid import Grid
from geoquant.methods.problem import Solution

__all__ = ["BLOCK", "BlockType", "block_type", "blocks_of", "pack"]

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """One of the types above: its name, the bits of a code, and whether a block has an offset."""

    name: str
    bits: int
    offset: bool

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.offset + self.bits * BLOCK // 8


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 4, False),
        BlockType("Q4_1", 4, True),
        BlockType("Q5_0", 5, False),
        BlockType("Q5_1", 5, True),
        BlockType("Q8_0", 8, False),
    )
}


def block_type(grid: Grid) -> BlockType:
    """The smallest type that holds the codes of this grid.

    Up to 3 asymmetric bits, `code - zero_point` fits the four signed bits of Q4_0, which is smaller than Q4_1 and
    needs no offset; the same holds for 6 and 7 bits and Q8_0. Raises UserError for 8 asymmetric bits.
    """
    if grid.symmetric:
        return TYPES["Q4_0" if grid.bits <= 4 else "Q5_0" if grid.bits == 5 else "Q8_0"]
    if grid.bits == 8:
        raise UserError(
            "GGUF blocks cannot hold 8-bit asymmetric codes",
            wanted="at most 7 asymmetric or 8 symmetric bits",
            fix="choose symmetric codes or --format dense",
        )
    return TYPES["Q4_0" if grid.bits <= 3 else "Q4_1" if grid.bits == 4 else "Q5_1" if grid.bits == 5 else "Q8_0"]


def pack(
    kind: BlockType,
    codes: Integer[Tensor, "rows columns"],
    steps: Float[Tensor, "rows blocks"],
    offsets: Float[Tensor, "rows blocks"] | None = None,
) -> UInt8[Tensor, "rows bytes"]:
    """Rows of blocks as bytes. codes: `q` of the table above; steps and offsets: float16."""
    low, high = (-128, 127) if kind.bits == 8 else (0, (1 << kind.bits) - 1)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes exceed {kind.name}: {int(codes.min())}..{int(codes.max())}")
    rows, columns = codes.shape
    blocks = codes.reshape(rows, columns // BLOCK, BLOCK)
    parts = [as_bytes(steps)] + ([as_bytes(offsets)] if kind.offset else [])
    if kind.bits == 8:
        parts.append(blocks.to(torch.int8).view(torch.uint8))
    else:
        blocks = blocks.to(torch.uint8)
        if kind.bits == 5:
            fifth = (blocks >> 4).reshape(rows, -1, 4, 8)
            parts.append((fifth << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
        parts.append(blocks[..., :16] & 15 | blocks[..., 16:] << 4)
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def as_bytes(halves: Float[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks 2"]:
    """float16 numbers as their two bytes."""
    return halves.contiguous().view(torch.uint8).reshape(*halves.shape, 2)


def blocks_of(name: str, solution: Solution) -> tuple[UInt8[Tensor, "rows bytes"], Rounding]:
    """A site's rows of blocks, and what float16 did to its steps and offsets.

    Groups hold whole blocks (gguf.refuse saw to it). An offset is `-step * zero_point`: with 4 and 5 bits that is a
    product of up to 13 significant bits of which float16 keeps 11.
    """
    kind, columns, size = block_type(solution.grid), solution.codes.shape[1], solution.grid.group_size
    codes, group = solution.codes.to(torch.int16), torch.arange(columns) // size
    zeros = torch.zeros(solution.scales.shape) if solution.zero_points is None else solution.zero_points.float()
    signed = codes - zeros[:, group].to(torch.int16)
    reach = torch.zeros(zeros.shape).scatter_reduce_(1, group.expand(codes.shape), signed.abs().float(), "amax")
    steps, rounding = half_steps(name, solution.scales, reach)
    block = torch.arange(columns // BLOCK) * BLOCK // size
    if not kind.offset:
        stored = signed if kind.bits == 8 else signed + (1 << (kind.bits - 1))
        return pack(kind, stored, steps[:, block]), rounding
    exact = -steps.float() * zeros
    offsets = exact.to(torch.float16)
    if not bool(offsets.isfinite().all()):
        raise UserError(
            f"{name} has offsets (step times zero point) that float16 cannot hold",
            got=f"{exact.abs().max().item():.3g}",
            wanted="at most 65504",
            fix="choose the format compressed-tensors or dense",
        )
    moved = (offsets.float() - exact).abs()
    rounding += Rounding(int((moved > 0).sum()), moved.max().item())
    return pack(kind, codes, steps[:, block], offsets[:, block]), rounding

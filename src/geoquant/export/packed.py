"""The small runtime form of a coded matrix: codes in nibbles, a sparse list of what lies beyond them, steps.

`W_ij = a_i b_j Z_ij`. The dense part holds Z clamped to what its width holds; the sparse list holds, row by row, the
columns whose code lies beyond and how far beyond. Nothing is lost, whatever the codes. A width of 4 bits is the point;
where so many codes lie beyond it that 8, 16 or 32 bits take fewer bytes, a matrix gets those. Products unpack a few
rows at a time or none: the whole matrix of weights never exists. docs/formats.md holds the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int, Int8, Integer, UInt8
from torch import Tensor, nn

from geoquant.lattice.unboxed import narrow, steps_of

__all__ = ["CACHED", "WIDTHS", "Packed", "pack", "place_type", "ranges"]

WIDTHS = {4: torch.uint8, 8: torch.int8, 16: torch.int16, 32: torch.int32}
FEW = 8  # tokens that are multiplied without unpacking
BLOCK = 1 << 19  # weights that are unpacked at a time: a megabyte of bfloat16
CACHED = 1 << 17  # codes that stay in a core's cache while several operations pass over them
SHARE = 1 << 20  # weights that are worth a thread


@dataclass(frozen=True)
class Packed:
    """One matrix.

    dense: (out, ceil(in / 2)) uint8 for width 4, column j in the low half of byte j and column j + ceil(in / 2) in the
    high half, each code plus 8; (out, in) integers of `width` bits else. pointers: (out + 1,) int32, where each row's
    part of the sparse list begins. places: (n,) columns, int16 where that holds them all, else int32. excess: (n,) what
    is added to the largest code of the width (to the smallest, if below zero), in the smallest integer type that holds
    all. row_steps, column_steps: the bits of bfloat16 numbers, int16.
    """

    width: int
    columns: int
    dense: Integer[Tensor, "out bytes"]
    pointers: Int[Tensor, " ends"]
    places: Int[Tensor, " n"]
    excess: Int[Tensor, " n"]
    row_steps: Int[Tensor, " out"]
    column_steps: Int[Tensor, " in"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The six tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def arrays(self) -> tuple[np.ndarray | bool, ...]:
        """The tensors for the compiled functions, which are told what the dense part is."""
        dense, *rest = (tensor.numpy() for tensor in self.tensors.values())
        return dense, self.width == 4, *rest

    @property
    def compilable(self) -> bool:
        """Whether the compiled functions take it: each kind of numbers would be compiled anew, so rare ones are not."""
        narrow = self.width <= 8 and self.places.dtype == torch.int16 and self.excess.dtype != torch.int32
        return narrow and self.dense.device.type == "cpu"

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def check(self) -> None:
        """Raise ValueError where the sparse list points outside of the matrix: compiled code does not look."""
        ends = self.pointers.to(torch.int64)
        ordered = ends[0] == 0 and ends[-1] == len(self.places) and (ends.diff() >= 0).all()
        if not (ordered and ((self.places >= 0) & (self.places < self.columns)).all()):
            raise ValueError("the sparse list points outside of the matrix")

    def codes(self, rows: slice | Int[Tensor, " k"]) -> Int[Tensor, "k in"]:
        """Some rows of Z, int32."""
        found = self.kept(rows).to(torch.int32)
        place, columns, excess = self.beyond(rows)
        found[place, columns] += excess
        return found

    def rows(self, rows: slice | Int[Tensor, " k"]) -> Float[Tensor, "k in"]:
        """Some rows of W, float32: bit for bit those of the run."""
        kept = self.kept(rows)
        found = kept.float()
        place, columns, excess = self.beyond(rows)
        found[place, columns] = (kept[place, columns] + excess).float()  # whole numbers first: float32 has 24 bits
        a, b = values(self.row_steps[rows]), values(self.column_steps)
        return found.mul_(a[:, None]).mul_(b)

    def kept(self, rows: slice | Int[Tensor, " k"]) -> Integer[Tensor, "k in"]:
        """Some rows of the dense part."""
        return spread(self.dense[rows], self.columns) if self.width == 4 else self.dense[rows]

    def beyond(self, rows: slice | Int[Tensor, " k"]) -> tuple[Tensor, Tensor, Int[Tensor, " n"]]:
        """Of the sparse list's entries in some rows: which of these rows, column, excess (int32)."""
        begin = self.pointers[:-1][rows].to(torch.int64)
        count = self.pointers[1:][rows].to(torch.int64) - begin
        place = torch.repeat_interleave(count)
        entry = torch.arange(len(place), device=place.device) + (begin + count - count.cumsum(0))[place]
        return place, self.places[entry].to(torch.int64), self.excess[entry].to(torch.int32)

    def multiply(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """`x W^T` in the type of x: compiled on a CPU; in torch operations elsewhere, for wide codes, without numba."""
        flat = x.reshape(-1, self.columns)
        kernel = compiled() if x.device.type == "cpu" and self.compilable else None
        if kernel is None:
            y = self.in_blocks(flat, lambda first, last: self.rows(slice(first, last)))
        elif len(flat) > FEW or (torch.is_grad_enabled() and x.requires_grad):
            y = self.in_blocks(flat, lambda first, last: self.unpacked(kernel, first, last, x.dtype))
        else:
            y = self.directly(kernel, flat)
        return y.view(*x.shape[:-1], len(self.dense))

    def in_blocks(self, x: Float[Tensor, "t in"], rows: Callable[[int, int], Tensor]) -> Float[Tensor, "t out"]:
        """Some rows of W at a time, and their products with all tokens."""
        count = len(self.dense)
        parts = [
            nn.functional.linear(x, rows(first, last).to(x.dtype)) for first, last in ranges(count, BLOCK, self.columns)
        ]
        return torch.cat(parts, dim=1)

    def unpacked(self, kernel: ModuleType, first: int, last: int, dtype: torch.dtype) -> Float[Tensor, "k in"]:
        """The same as `rows`, compiled; in bfloat16 right away where that is wanted, else in float32."""
        half = dtype == torch.bfloat16
        found = torch.empty(last - first, self.columns, dtype=torch.int16 if half else torch.float32)
        none = np.empty((0, self.columns), np.float32 if half else np.int16)
        outputs = (none, found.numpy()) if half else (found.numpy(), none)
        kernel.weights(*self.arrays, *limits(self.width), first, last, *outputs)
        return found.view(torch.bfloat16) if half else found

    def directly(self, kernel: ModuleType, x: Float[Tensor, "t in"]) -> Float[Tensor, "t out"]:
        """A few tokens; large matrices by several threads."""
        count = len(self.dense)
        y = torch.empty(len(x), count)
        tokens, found, run = x.detach().to(torch.float32).contiguous().numpy(), y.numpy(), kernel.dots
        if len(x) == 1:
            tokens, found, run = tokens[0], found[0], kernel.dot
        share = min(torch.get_num_threads(), max(1, count * self.columns // SHARE))
        if share <= 1:
            run(tokens, *self.arrays, 0, count, found)
        else:
            ends = [count * part // share for part in range(share + 1)]
            arrays = self.arrays
            list(threads(share).map(lambda part: run(tokens, *arrays, *part, found), pairwise(ends)))
        return y.to(x.dtype)


@cache
def compiled() -> ModuleType | None:
    """The compiled functions, or None without numba."""
    try:
        from geoquant.export import matvec
    except ImportError:
        return None
    return matvec


@cache
def threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def pack(
    codes: Integer[Tensor, "out in"],
    row_exponents: Int[Tensor, " out"],
    column_exponents: Int[Tensor, " in"],
    width: int | None = None,
) -> Packed:
    """The form of these codes; width: 4, 8, 16 or 32, or else the one that takes the fewest bytes.

    Exponents as in `steps_of`. Raises ValueError where the sparse list would hold 2^31 codes or more.
    """
    width = width or min(WIDTHS, key=lambda width: needed(codes, width))
    dense, counts, places, excess = [], [], [], []
    for part in parts(codes):
        kept = part.clamp(*limits(width))
        rows, columns = torch.nonzero(part != kept, as_tuple=True)
        dense.append(nibbles(kept) if width == 4 else kept.to(WIDTHS[width]))
        counts.append(torch.bincount(rows, minlength=len(part)))
        places.append(columns.to(place_type(codes.shape[1])))
        excess.append((part - kept)[rows, columns])
    ends = torch.cat(counts).cumsum(0)
    if ends[-1] >= 1 << 31:
        raise ValueError("2^31 codes or more lie beyond the dense part: choose a larger width")
    return Packed(
        width=width,
        columns=codes.shape[1],
        dense=torch.cat(dense),
        pointers=nn.functional.pad(ends, (1, 0)).to(torch.int32),
        places=torch.cat(places),
        excess=narrow(torch.cat(excess)),
        row_steps=bits_of(row_exponents),
        column_steps=bits_of(column_exponents),
    )


def needed(codes: Integer[Tensor, "out in"], width: int) -> int:
    """Bytes that depend on the width: the dense part and the sparse list."""
    beyond, extreme = 0, torch.zeros(2, dtype=torch.int32)
    for part in parts(codes):
        rest = part - part.clamp(*limits(width))
        beyond += int(rest.count_nonzero())
        extreme = torch.stack([torch.minimum(extreme[0], rest.min()), torch.maximum(extreme[1], rest.max())])
    each = narrow(extreme[None]).itemsize + place_type(codes.shape[1]).itemsize
    return len(codes) * -(-codes.shape[1] * width // 8) + each * beyond


def parts(codes: Integer[Tensor, "out in"]) -> Iterator[Int[Tensor, "k in"]]:
    """Rows as int32, some at a time."""
    return (codes[first:last].to(torch.int32) for first, last in ranges(len(codes), CACHED, codes.shape[1]))


def ranges(rows: int, weights: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows with about so many weights each."""
    step = max(1, weights // columns)
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def limits(width: int) -> tuple[int, int]:
    """The smallest and the largest code of the dense part."""
    return -(1 << width - 1), (1 << width - 1) - 1


def place_type(columns: int) -> torch.dtype:
    """What holds a column."""
    return torch.int16 if columns <= 1 << 15 else torch.int32


def nibbles(codes: Int[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    """Codes of -8 to 7, two a byte."""
    low, high = (codes + 8).to(torch.uint8).tensor_split([-(-codes.shape[1] // 2)], dim=1)
    return low | nn.functional.pad(high, (0, low.shape[1] - high.shape[1]), value=8) << 4


def spread(packed: UInt8[Tensor, "k bytes"], columns: int) -> Int8[Tensor, "k in"]:
    """The codes back."""
    return torch.cat([packed & 15, packed >> 4], dim=1)[:, :columns].view(torch.int8) - 8


def bits_of(exponents: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Steps as bits of bfloat16, which holds them exactly; as integers no cast of a model touches them."""
    return steps_of(exponents).to(torch.bfloat16).view(torch.int16)


def values(bits: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Steps as float32."""
    return bits.view(torch.bfloat16).float()

"""Weights that stay on disk until they are needed.

A model folder in its stored dtype is mapped into memory, not read: a page of weights costs memory from its first
use on. `release` gives the pages of a block back once the block has been used; the next use reads them again, from
the system's file cache in most cases. So a pass over the model block by block holds the embeddings and one block,
whatever the size of the model.

This holds on Linux for weights that nobody has written to. Anything else (another system, a converted dtype, a
GPU, a mapping with a written page) is left as it is: `release` then does nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

__all__ = ["UNMAPPED", "Pages", "map_weights", "trim", "unload"]

DONTNEED = 4  # of madvise(2)
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) .*\.safetensors$")


@dataclass(frozen=True)
class Pages:
    """Address ranges that hold nothing but unchanged file content, sorted.

    anchors: a tensor in each range. While it lives the file stays mapped there, so that no other memory can come to lie
    at these addresses.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    anchors: tuple[Tensor, ...] = field(default=(), repr=False)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Give back the memory of those tensors that lie in the mapped files. Their values do not change.

        Never call it once a weight was changed in place: the file's values would come back.
        """
        if not self.ranges:
            return
        starts = [start for start, _ in self.ranges]
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.numel() == 0:
                continue
            address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            index = bisect_right(starts, address) - 1
            if index < 0 or address + size > self.ranges[index][1]:
                continue
            # Whole pages, those at the edges too: what they share with a neighbour comes back from the file as well.
            first = address - address % mmap.PAGESIZE
            last = min(-(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE, self.ranges[index][1])
            madvise(first, last - first, DONTNEED)


UNMAPPED = Pages()


def map_weights(model: nn.Module) -> Pages:
    """The mapped files that hold weights of `model`, without those that have a written page."""
    if not sys.platform.startswith("linux"):
        return UNMAPPED
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return UNMAPPED
    clean, current = set(), None
    for line in lines:
        if "-" in line.split(" ", 1)[0]:
            found = HEADER.match(line)
            current = (int(found[1], 16), int(found[2], 16)) if found else None
            clean |= {current} if current else set()
        elif current and line.startswith(("Anonymous:", "Swap:")) and int(line.split()[1]):
            clean.discard(current)
    anchors = {}
    for parameter in model.parameters():
        for start, end in clean:
            if parameter.device.type == "cpu" and start <= parameter.data_ptr() < end:
                anchors.setdefault((start, end), parameter.detach())
    ranges = tuple(sorted(anchors))
    return Pages(ranges, tuple(anchors[found] for found in ranges))


def trim() -> None:
    """Hand freed memory back to the system (glibc keeps it for later); nothing elsewhere."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if give_back is not None:
        give_back(0)


def unload(module: nn.Module) -> None:
    """Forget the weight of a linear map but not its shape and dtype: one zero, seen as a matrix."""
    module.weight.data = module.weight.new_zeros(()).expand(module.weight.shape)

"""Token sequences of one text or of one set of records, cut to rectangles that stream, and their independent parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["TOGETHER", "Sequences", "heldout_start", "padded"]

TOGETHER = 1024  # tokens that go through a block at once, or two sequences


@dataclass(frozen=True)
class Sequences:
    """Sequences of one text: `tokens` (n, length) padded on the right, `lengths` (n,) of what is real; `batch` of them
    go through the model together (None: two, or one of an odd number).

    Under causal attention nothing real sees what comes after it, so padding changes no real token.
    """

    tokens: Int[Tensor, "n length"]
    lengths: Int[Tensor, " n"]
    batch: int | None = None

    @property
    def count(self) -> int:
        """How many real tokens."""
        return int(self.lengths.sum())


def padded(sequences: Sequence[Sequence[int]], filler: int, parts: int = 1) -> Sequences:
    """Sequences of any lengths in one rectangle; every batch holds short and long ones.

    parts: the number of batches is a multiple of it where the number of sequences is one. Raises ValueError where a
    sequence has fewer than two tokens: nothing would be predicted.
    """
    short = [len(sequence) for sequence in sequences if len(sequence) < 2]
    if short or not sequences:
        raise ValueError(
            f"sequences of at least two tokens, but got {len(sequences)} of which {len(short)} are shorter"
        )
    count, longest = len(sequences), max(map(len, sequences))
    fits = [size for size in range(1, max(2, TOGETHER // longest) + 1) if count % (size * parts) == 0]
    batch = max(fits, default=None)
    batches = count // (batch or 1)
    ordered = [one for first in range(batches) for one in sorted(sequences, key=len)[first::batches]]
    lengths = torch.tensor([len(sequence) for sequence in ordered])
    tokens = torch.full((len(ordered), int(lengths.max())), filler)
    for row, sequence in enumerate(ordered):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return Sequences(tokens, lengths, batch)


def heldout_start(count: int) -> int:
    """Windows or sequences from here on are held out: one in eight, none if there are fewer than four."""
    return count - max(1, count // 8) if count >= 4 else count

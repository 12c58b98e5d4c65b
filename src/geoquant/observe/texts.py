"""Token sequences of one text or of one set of records, cut to rectangles that stream, and their independent parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Sequences", "padded"]


@dataclass(frozen=True)
class Sequences:
    """Sequences of one text: `tokens` (n, length) padded on the right, `lengths` (n,) of what is real.

    Under causal attention nothing real sees what comes after it, so padding changes no real token.
    """

    tokens: Int[Tensor, "n length"]
    lengths: Int[Tensor, " n"]

    @property
    def count(self) -> int:
        """How many real tokens."""
        return int(self.lengths.sum())


def padded(sequences: Sequence[Sequence[int]], filler: int) -> Sequences:
    """Sequences of any lengths in one rectangle, the shortest first, so that neighbours are of about one length.

    Raises ValueError where a sequence has fewer than two tokens: nothing would be predicted.
    """
    short = [len(sequence) for sequence in sequences if len(sequence) < 2]
    if short or not sequences:
        raise ValueError(
            f"sequences of at least two tokens, but got {len(sequences)} of which {len(short)} are shorter"
        )
    ordered = sorted(sequences, key=len)
    lengths = torch.tensor([len(sequence) for sequence in ordered])
    tokens = torch.full((len(ordered), int(lengths.max())), filler)
    for row, sequence in enumerate(ordered):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return Sequences(tokens, lengths)

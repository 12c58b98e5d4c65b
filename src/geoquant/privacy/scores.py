"""What one forward pass a record leaves for the attacks, in memory and on disk.

For every scored token t of a record, with p the model's distribution given the true tokens before it:

    log_prob       log p(x_t)
    mean, std      of log p(z) under z ~ p (Min-K%++, arXiv:2404.02936, standardises log_prob with them)
    rank           how many tokens p prefers to x_t (of equally likely ones those of lower index): 0 is the argmax
    digit_mass     log of p's mass on the ten digit tokens, where x_t is one of them; NaN elsewhere
    starts, ends   the characters [start, end) of the record that the token covers

Logarithms are natural. They are sufficient: every attack, extraction and exposure reads these and asks the model no
more. On disk they hold no text and no token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.runs import read_tensors, write_tensors

__all__ = ["Kept", "RecordScores", "SplitScores", "load_scores", "save_scores"]

ALONE = "values"  # names the tensor of what is an array and no scores


@dataclass(frozen=True)
class RecordScores:
    """Per-token statistics of n records, concatenated; record i owns tokens splits[i]:splits[i+1]."""

    log_prob: Float[np.ndarray, " tokens"]
    mean: Float[np.ndarray, " tokens"]
    std: Float[np.ndarray, " tokens"]
    rank: Int[np.ndarray, " tokens"]
    digit_mass: Float[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]
    splits: Int[np.ndarray, " n+1"]

    def __len__(self) -> int:
        return len(self.splits) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Scored tokens of each record."""
        return np.diff(self.splits)

    @property
    def correct(self) -> Bool[np.ndarray, " tokens"]:
        """Whether greedy decoding would have written the token."""
        return self.rank == 0

    def record_sums(self, values: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " n"]:
        """Sum of a per-token quantity over each record; 0 for a record without scored tokens."""
        # Each record's own sum: differences of a running one would carry the roundings of the records before it, which
        # differ between the sides, and an infinity into all behind it.
        sums, full = np.zeros(len(self)), np.flatnonzero(self.lengths)
        if len(full):
            sums[full] = np.add.reduceat(values.astype(np.float64), self.splits[full])
        return sums

    def covering(self, record: int, start: int, end: int) -> slice | None:
        """The tokens of `record` that touch characters [start, end); None if one was not scored."""
        low, high = self.splits[record], self.splits[record + 1]
        touching = np.flatnonzero((self.starts[low:high] < end) & (self.ends[low:high] > start)) + low
        if not len(touching):
            return None
        part = slice(int(touching[0]), int(touching[-1]) + 1)
        complete = self.starts[part.start] <= start and self.ends[part.stop - 1] >= end
        return part if complete else None


@dataclass(frozen=True)
class SplitScores:
    """One model's scores on the two sides of a split and on its canaries.

    decoys: the canaries with other random secrets, `len(decoys) / len(canaries)` for each in order; only made
    where the tokenizer merges digits (see privacy/exposure.py). withheld: canaries that coins left out. lowered_*: the
    texts of the two sides in lower case. prompted_*: of what an attacker asks for the two sides (privacy/prompts.py).
    walked: exact exposure of some canaries in bits, NaN for the others.
    """

    members: RecordScores
    nonmembers: RecordScores
    canaries: RecordScores | None = None
    decoys: RecordScores | None = None
    withheld: RecordScores | None = None
    lowered_members: RecordScores | None = None
    lowered_nonmembers: RecordScores | None = None
    prompted_members: RecordScores | None = None
    prompted_nonmembers: RecordScores | None = None
    walked: Float[np.ndarray, " canaries"] | None = None


@dataclass(frozen=True)
class Kept:
    """Scores that were measured before: `folder` holds one file for each list of texts and model.

    model: hash of what decides the model's output (model/identity.py). A file is named by that, by the tokens of the
    texts and by how they were scored, so that nothing stale can be read.
    """

    folder: Path
    model: str

    def read(self, name: str) -> RecordScores | np.ndarray | None:
        """What was kept under this name."""
        path = self._path(name)
        return _part(read_tensors(path)[0], path) if path.exists() else None

    def write(self, name: str, found: RecordScores | np.ndarray) -> None:
        """Keep it."""
        write_tensors(self._path(name), _tensors(found))

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.model[:16]}-{name}.safetensors"


def save_scores(path: Path, scores: SplitScores, split: Split) -> None:
    """Write one safetensors file; the hash of the records goes with it."""
    parts = {side.name: part for side in fields(SplitScores) if (part := getattr(scores, side.name)) is not None}
    tensors = {f"{side}.{name}": tensor for side, part in parts.items() for name, tensor in _tensors(part).items()}
    write_tensors(path, tensors, {"records": split.sha256})


def load_scores(path: Path, split: Split) -> SplitScores:
    """Read what `save_scores` wrote. Raises UserError when it belongs to other records."""
    tensors, metadata = read_tensors(path)
    if metadata.get("records") != split.sha256:
        raise UserError(f"{path} holds scores of other records", fix="delete it and run again")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        side, _, name = key.partition(".")
        sides.setdefault(side, {})[name] = tensor
    return SplitScores(**{side: _part(part, path) for side, part in sides.items()})


def _tensors(part: RecordScores | np.ndarray) -> dict[str, Tensor]:
    if isinstance(part, np.ndarray):
        return {ALONE: torch.from_numpy(part)}
    return {name.name: torch.from_numpy(getattr(part, name.name)) for name in fields(RecordScores)}


def _part(tensors: dict[str, Tensor], path: Path) -> RecordScores | np.ndarray:
    if tensors.keys() == {ALONE}:
        return tensors[ALONE].numpy()
    if tensors.keys() != {name.name for name in fields(RecordScores)}:
        raise UserError(f"{path} was written by another version of geoquant", fix="delete it and run again")
    return RecordScores(**{name: tensor.numpy() for name, tensor in tensors.items()})

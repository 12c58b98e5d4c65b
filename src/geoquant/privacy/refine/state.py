"""Where a refinement stands after a pass, in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from geoquant.model.walk import Block
from geoquant.privacy.refine.losses import Losses
from geoquant.privacy.refine.reach import Reach
from geoquant.runs import read_metadata, read_tensors, write_tensors

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """key: names start and settings; a file of another key is not read.

    What is kept: latents, best offsets, losses so far, how far the next update goes, and, where other codes were
    offered to start from, the losses of both.
    """

    path: Path
    key: str

    def write(
        self,
        latents: dict[str, Tensor],
        best: dict[str, Tensor],
        history: list[Losses],
        reach: Reach,
        tried: tuple[Losses, Losses] | None = None,
    ) -> None:
        tensors = {f"latent {name}": latent for name, latent in latents.items()}
        tensors |= {f"best {name}": offsets for name, offsets in best.items()}
        metadata = {"key": self.key, "history": json.dumps([losses.to_dict() for losses in history])}
        metadata["reach"] = json.dumps(asdict(reach))
        metadata["tried"] = json.dumps([losses.to_dict() for losses in tried or ()])
        write_tensors(self.path, tensors, metadata)

    def read(
        self,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Losses], Reach, tuple[Losses, ...] | None] | None:
        """What was written; None where nothing is of this key."""
        tensors, metadata = read_tensors(self.path) if self.path.exists() else ({}, {})
        if metadata.get("key") != self.key:
            return None
        kinds: dict[str, dict[str, Tensor]] = {"latent": {}, "best": {}}
        for name, tensor in tensors.items():
            kind, _, stage = name.partition(" ")
            kinds[kind][stage] = tensor
        history, tried = ([Losses(**one) for one in json.loads(metadata[name])] for name in ("history", "tried"))
        return kinds["latent"], kinds["best"], history, Reach(**json.loads(metadata["reach"])), tuple(tried) or None


@dataclass(frozen=True)
class BlockState:
    """Finished blocks of a block-wise refinement, a file each: latents, and errors before and after. key: as above; the
    codes of a block depend on those before it, so that a block counts only where these do."""

    folder: Path
    key: str

    def write(self, block: Block, latents: dict[str, Tensor], errors: tuple[dict[str, float], ...]) -> None:
        write_tensors(self._path(block), latents, {"key": self.key, "errors": json.dumps(errors)})

    def read(self, block: Block) -> tuple[dict[str, Tensor], tuple[dict[str, float], ...]] | None:
        """None where the block is not done under this key."""
        path = self._path(block)
        tensors, metadata = read_tensors(path) if path.exists() else ({}, {})
        return (tensors, tuple(json.loads(metadata["errors"]))) if metadata.get("key") == self.key else None

    def complete(self, blocks: Iterable[Block]) -> bool:
        """Whether all of these are done."""
        paths = [self._path(block) for block in blocks]
        return all(path.exists() and read_metadata(path).get("key") == self.key for path in paths)

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.name}.safetensors"

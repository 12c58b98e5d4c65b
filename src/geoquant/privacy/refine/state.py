"""Where a refinement stands after a pass, in one file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from geoquant.privacy.refine.losses import Losses
from geoquant.privacy.refine.reach import Reach
from geoquant.runs import read_tensors, write_tensors

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """key: names start and settings; a file of another key is not read."""

    path: Path
    key: str

    def write(self, latents: dict[str, Tensor], best: dict[str, Tensor], history: list[Losses], reach: Reach) -> None:
        tensors = {f"latent {name}": latent for name, latent in latents.items()}
        tensors |= {f"best {name}": offsets for name, offsets in best.items()}
        metadata = {"key": self.key, "history": json.dumps([losses.to_dict() for losses in history])}
        metadata["reach"] = json.dumps(asdict(reach))
        write_tensors(self.path, tensors, metadata)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Losses], Reach] | None:
        """Latents, best offsets, losses so far, and how far the next update goes; None where nothing is of this key."""
        tensors, metadata = read_tensors(self.path) if self.path.exists() else ({}, {})
        if metadata.get("key") != self.key:
            return None
        kinds: dict[str, dict[str, Tensor]] = {"latent": {}, "best": {}}
        for name, tensor in tensors.items():
            kind, _, stage = name.partition(" ")
            kinds[kind][stage] = tensor
        history = [Losses(**one) for one in json.loads(metadata["history"])]
        return kinds["latent"], kinds["best"], history, Reach(**json.loads(metadata["reach"]))

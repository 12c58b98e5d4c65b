"""The state of an interrupted fine-tune: weights that learn, both moments of AdamW, and how many steps were done.

The order of the batches, the learning rate and dropout's seeds follow from the settings and the number of the step, so
nothing else is needed to go on to the same bits. One safetensors file, written beside and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from geoquant.errors import UserError
from geoquant.runs import read_tensors, write_tensors

__all__ = ["fingerprint", "load_state", "save_state"]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
HASHED = ("model", "records", "public text")


def fingerprint(
    settings: dict, weights: Iterable[Tensor], examples: Sequence[Sequence[int]], public: Sequence[Sequence[int]]
) -> dict[str, str]:
    """What a training run is, by the name that a refusal gives it: settings as they are, the rest as SHA-256."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    texts = (hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (examples, public))
    hashes = dict(zip(HASHED, (digest.hexdigest(), *texts), strict=True))
    return {name: repr(value) for name, value in settings.items()} | hashes


def save_state(
    path: Path, masters: Sequence[Tensor], optimizer: torch.optim.Optimizer, known: dict[str, str], done: int
) -> None:
    """Write the state after `done` steps, atomically: the last one stays until the next is whole."""
    tensors = {}
    for index, master in enumerate(masters):
        tensors[f"{index}.master"] = master.detach()
        for name in MOMENTS:
            # A weight that never got a gradient has no moments.
            if name in optimizer.state[master]:
                tensors[f"{index}.{name}"] = optimizer.state[master][name]
    write_tensors(path, tensors, {"done": str(done), "fingerprint": json.dumps(known)})


def load_state(path: Path, masters: Sequence[Tensor], optimizer: torch.optim.Optimizer, known: dict[str, str]) -> int:
    """Put back what `save_state` wrote, in place; returns the steps done, 0 where there is no file.

    Raises UserError when it is damaged or belongs to another training run.
    """
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    try:
        done, written = int(metadata["done"]), json.loads(metadata["fingerprint"])
    except (KeyError, ValueError):
        raise UserError(f"{path} is no checkpoint of a fine-tune", fix="delete it, or choose another file") from None
    for name, now in known.items():
        if (before := written.get(name)) == now:
            continue
        again = "go on with the same, or delete the checkpoint to start over"
        if name in HASHED:
            raise UserError(f"the {name} changed since the training of {path} was started", fix=again)
        raise UserError(f"the training of {path} was started with {name} = {before}", got=now, fix=again)
    for index, master in enumerate(masters):
        master.copy_(tensors[f"{index}.master"])
        state = {name: tensors[f"{index}.{name}"] for name in MOMENTS if f"{index}.{name}" in tensors}
        if state:
            optimizer.state[master] = {name: value.to(master.device) for name, value in state.items()}
    return done

"""One hash of what a model in memory computes, wherever it came from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from geoquant.model.load import Loaded

__all__ = ["described", "model_hash"]

# Entries of a configuration that change no output: where a model was found, whether it remembers keys.
IDLE = ("_name_or_path", "transformers_version", "use_cache")
PIECE = 1 << 24  # elements of a tensor on another device that are brought here at a time


def model_hash(model: nn.Module) -> str:
    """SHA-256 of the model's class, its configuration, and the names, types, shapes and bytes of its tensors."""
    digest = hashlib.sha256(type(model).__name__.encode())
    if (config := getattr(model, "config", None)) is not None:
        told = {name: value for name, value in config.to_dict().items() if name not in IDLE}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in tensor.detach().flatten().split(PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(loaded: Loaded) -> dict:
    """What a result says of a model: where it came from, what it is, and the hash of what it computes."""
    return {
        "name": loaded.name,
        "source": loaded.source,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.parameters,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "sha256": model_hash(loaded.model),
    }

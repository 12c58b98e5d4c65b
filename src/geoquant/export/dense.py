"""Dense export: the quantized values as ordinary floating-point weights, for any reader."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from geoquant.export.weights import (
    MAX_SHARD_BYTES,
    ExportResult,
    chosen_dtype,
    summarize,
    untouched,
    write_shards,
    write_side_files,
)
from geoquant.runs import atomic_directory

__all__ = ["export_dense"]


def export_dense(
    model: nn.Module,
    tokenizer: object,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Write the model as it is in memory (linears already overwritten by their quantized values, kept columns
    too).

    dtype: of all floating tensors (default: as in the model). A code of b bits times a step of 8 significant
    bits needs b+7 bits: bfloat16 (8) and, from 5 bits on, float16 (11) round it; float32 never does. Raises
    UserError when a value does not fit into float16 and when the disk is full.
    """
    dtype = chosen_dtype(model, dtype)
    linears = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    linear = 0

    def tensors():
        nonlocal linear
        for name, tensor in untouched(model, (), dtype):
            if name.removesuffix(".weight") in linears:
                linear += tensor.nbytes
            yield name, tensor

    with atomic_directory(out) as folder:
        write_shards(folder, tensors(), max_shard_bytes)
        write_side_files(folder, model, tokenizer, dtype)
    return summarize(out, linear)

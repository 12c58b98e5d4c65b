"""Kept columns as a PEFT LoRA adapter: `x[kept] @ W[:, kept].T` is a low-rank update with A a column
selector.

The base has zeros in the kept columns O, so `y = x Q^T + (x A^T) B^T` with `A = I[O]` (k, in), `B = W[:, O]`
(out, k) is the mixed-precision layer itself. LoRA scales its update by alpha/r; alpha = r makes that exactly
1.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from geoquant.export.weights import ExportResult, summarize
from geoquant.methods.problem import Solution
from geoquant.runs import atomic_directory, atomic_write, write_json

__all__ = ["export_adapter"]


def selector(index: Tensor, columns: int) -> Tensor:
    """(k, in) bfloat16 matrix that picks the columns `index`: one 1 per row, exact in every float type."""
    rows = torch.zeros(index.numel(), columns, dtype=torch.bfloat16)
    rows[torch.arange(index.numel()), index] = 1.0
    return rows


def adapter_config(ranks: Mapping[str, int], base_name: str) -> dict:
    """adapter_config.json for sites of the given ranks; only ranks that differ from the common one are
    listed.
    """
    common = statistics.mode(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def export_adapter(
    solutions: Mapping[str, Solution] | Iterable[tuple[str, Solution]], out: Path, base_name: str = ""
) -> ExportResult | None:
    """Write adapter_config.json and adapter_model.safetensors, or nothing (None) when no column was kept.

    base_name: what AutoPeftModel would load as the base. PEFT resolves it against the working directory of
    the *reader*, so a path is right for one place only; empty means: pass the base model yourself.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, solution in solutions.items() if isinstance(solutions, Mapping) else solutions:
        kept = solution.kept_index
        if not kept.numel():
            continue
        ranks[name] = kept.numel()
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = selector(kept, solution.codes.shape[1])
        tensors[f"{prefix}.lora_B.weight"] = solution.kept_weight.contiguous()
    if not ranks:
        return None
    with atomic_directory(out) as folder:
        path = folder / "adapter_model.safetensors"
        atomic_write(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
        write_json(folder / "adapter_config.json", adapter_config(ranks, base_name))
    return summarize(out, sum(tensor.nbytes for tensor in tensors.values()))

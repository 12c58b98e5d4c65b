"""What every export shares: the tensors a run did not touch, shards, config, tokenizer.

Tensors are produced one at a time and written shard by shard, so an export needs the model plus one shard,
never two copies of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.runs import atomic_directory, atomic_write, write_json

__all__ = [
    "MAX_SHARD_BYTES",
    "ExportResult",
    "chosen_dtype",
    "linear_site",
    "summarize",
    "tied_heads",
    "tied_weights",
    "untouched",
    "write_coded",
    "write_shards",
    "write_side_files",
]

MAX_SHARD_BYTES = 2 << 30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExportResult:
    """What was written: the folder, its size, the share of it that holds linear weights, its files, and what the user
    should know about them.
    """

    folder: Path
    bytes_total: int
    bytes_linear: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def chosen_dtype(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the untouched tensors: the one asked for, else the one the model has."""
    dtype = model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise UserError("unknown export dtype", got=dtype, wanted="float32, bfloat16 or float16")
    return dtype


def tied_weights(model: nn.Module) -> set[str]:
    """Names of the weights that the model ties to one another."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return set(ties) | set(ties.values())


def tied_heads(model: nn.Module, sites: Collection[str]) -> dict[str, str]:
    """Modules that are not stored because they share the weight of a coded one: their names and its name."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = ((one.removesuffix(".weight"), other.removesuffix(".weight")) for one, other in ties.items())
    return {one: other for one, other in pairs if other in sites}


def linear_site(name: str, modules: Mapping[str, nn.Module], tied: Collection[str], readers: str) -> nn.Linear:
    """The layer `name` as something that the `readers` of a format can hold in codes.

    tied: names of all weights that share memory with another. Raises UserError where it is no such thing.
    """
    module = modules.get(name)
    if module is None:
        raise ValueError(f"the model has no module {name!r}")
    if not isinstance(module, nn.Linear):
        raise UserError(
            f"{readers} readers know torch.nn.Linear only; {name} is {type(module).__name__}",
            fix="choose --format dense",
        )
    if f"{name}.weight" in tied:
        raise UserError(
            f"{name} shares its weight with the embedding; a reader would tie it back",
            fix="leave it unquantized",
        )
    return module


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if it is floating point; a value that does not fit is the user's to know."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype is torch.float16 and not bool(torch.isfinite(result).all()):
        raise UserError(f"tensor {name} does not fit into float16", fix="export in bfloat16 or float32")
    return result


def untouched(
    model: nn.Module, skip: Collection[str], dtype: torch.dtype, replaced: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything a reader needs except the weights of the modules in `skip`, cast lazily.

    What stands in `replaced` is given instead of the model's, in its own dtype.

    Of tied tensors only the one that the model ties *to* is given (a reader restores the tie); tensors that
    share memory without being declared tied are given each. Names are those of the model's own checkpoints
    where that differs from memory (fused experts) and nothing was quantized; both load in stock transformers.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if last == "weight" and owner in skip:
            continue
        if tensor.device.type == "meta":
            raise UserError(f"tensor {name} is not in memory", fix="load the model without offloading to disk")
        if name in tied and tied[name] in state:
            if tensor.data_ptr() != state[tied[name]].data_ptr():
                raise ValueError(f"{name} is declared tied to {tied[name]} but holds other values")
            continue
        kept[name] = tensor
    if not skip:
        from transformers.core_model_loading import revert_weight_conversion

        kept = revert_weight_conversion(model, kept)
    replaced = replaced or {}
    for name in list(kept):
        tensor = kept.pop(name)
        yield name, replaced[name] if name in replaced else cast(name, tensor, dtype)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `tensors` to `model.safetensors`, or to numbered shards and their index, holding one shard in
    memory.

    A shard is at most `max_shard_bytes` of tensor data unless a single tensor is larger.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        shards.append(list(pending))
        path = folder / f"shard-{len(shards):05d}"
        atomic_write(path, lambda partial: save_file(pending, partial, metadata={"format": "pt"}))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors refuses views of one storage; only the part that is written gets copied.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    if len(shards) == 1:
        (folder / "shard-00001").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        # The number of shards is part of each name and known only now.
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_side_files(
    folder: Path, model: nn.Module, tokenizer: object, dtype: torch.dtype, quantization: dict | None = None
) -> None:
    """config.json (with `quantization` as its quantization_config), generation_config.json, tokenizer
    files.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # a run switches the cache off for itself; readers generate with it
    config.dtype = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config.quantization_config = quantization
    texts = {"config.json": config.to_json_string(use_diff=True)}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained: it refuses generation settings that the original folder came with.
        texts["generation_config.json"] = generation.to_json_string(use_diff=True)
    for name, text in texts.items():
        atomic_write(folder / name, lambda partial, text=text: partial.write_text(text, encoding="utf-8") and None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_coded(
    out: Path,
    model: nn.Module,
    tokenizer: object,
    coded: Iterable[tuple[str, Tensor]],
    sites: Mapping[str, dict],
    settings: dict,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Write `out` in a format of our own: the tensors of coded matrices, then everything else as it is, in `dtype`.

    sites: what config.json says of each coded matrix, filled while `coded` is read. settings: what else it says.
    """
    dtype, linear = chosen_dtype(model, dtype), 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal linear
        for name, tensor in coded:
            linear += tensor.nbytes
            yield name, tensor
        yield from untouched(model, sites, dtype)

    with atomic_directory(out) as folder:
        write_shards(folder, tensors(), max_shard_bytes)
        quantization = {**settings, "sites": sites, "tied": tied_heads(model, sites)}
        write_side_files(folder, model, tokenizer, dtype, quantization)
    return summarize(out, linear)


def summarize(folder: Path, bytes_linear: int, notes: tuple[str, ...] = ()) -> ExportResult:
    """Sizes and names of the files in a finished folder, and `notes` for the report."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ExportResult(
        folder=folder,
        bytes_total=sum(path.stat().st_size for path in files),
        bytes_linear=bytes_linear,
        files=tuple(str(path.relative_to(folder)) for path in files),
        notes=notes,
    )

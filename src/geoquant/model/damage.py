"""What is wrong with the files of a model: told before, or in place of, what the libraries that read them would say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from geoquant.errors import UserError
from geoquant.runs import inside

__all__ = ["already_quantized", "check_folder", "explain_gguf", "first_line"]


def check_folder(folder: Path, *, quantized: bool = False) -> None:
    """Name what is missing or truncated in an HF folder before transformers tries to read it."""
    config = folder / "config.json"
    if not config.exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder} is an adapter, no model", fix="merge it into its base and give the whole model")
        hint = inside(folder, "config.json", *(("manifest.json",) if quantized else ()))
        raise UserError(f"{folder} has no config.json", wanted="a Hugging Face model folder", fix=hint)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is damaged: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{config} is damaged: it is not a JSON object", fix="download it again")
    if settings.get("quantization_config") and not quantized:
        raise already_quantized(folder, settings["quantization_config"])
    index = folder / "model.safetensors.index.json"
    shards: list[Path]
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{index} is damaged", wanted="a JSON object with a weight_map", fix="download it again"
            ) from None
    else:
        weight_map = {}
        shards = [folder / "model.safetensors"]
        if not shards[0].exists():
            if list(folder.glob("*.bin")):
                raise UserError(f"{folder} holds pickled .bin weights", wanted="safetensors", fix="convert them first")
            raise UserError(f"{folder} holds no model.safetensors", fix="download or save the weights again")
    for shard in shards:
        if not shard.exists():
            raise UserError(f"weights file {shard} is missing (named in {index.name})", fix="download it again")
        try:
            with safe_open(shard, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            with shard.open("rb") as stream:
                if stream.read(19) == b"version https://git":
                    raise UserError(
                        f"weights file {shard} is a Git LFS pointer, not the weights", fix="run there: git lfs pull"
                    ) from None
            raise UserError(
                f"weights file {shard} is truncated or damaged: {error}", fix="download or copy it again"
            ) from None
        lost = sorted(name for name, where in weight_map.items() if where == shard.name and name not in types)
        if lost:
            raise UserError(f"tensor {lost[0]} is missing from {shard}", fix="download or save the weights again")
        # Eight-bit floats without their scales are not the weights.
        small = sorted(name for name, held in types.items() if held.startswith("F8"))
        if small and not quantized:
            raise UserError(
                f"tensor {small[0]} in {shard} is in the 8-bit type {types[small[0]]}",
                wanted="full-precision weights (fp32, bf16, fp16)",
            )


def already_quantized(where: object, settings: object) -> UserError:
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
    return UserError(f"{where} is already quantized ({method})", wanted="full-precision weights (fp32, bf16, fp16)")


def explain_gguf(path: Path, error: BaseException) -> UserError:
    """Why a GGUF file could not be loaded: not one, cut short, a type nobody here can unpack, or `error`."""
    import gguf

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return UserError(f"{path} is not a GGUF file (it does not begin with GGUF)", fix="download it again")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as broken:
        if found := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(broken)):
            return UserError(
                f"GGUF file {path} holds tensors of the unknown quantization type {found[1]}",
                fix="use a file in another type (F16, Q8_0, Q4_K...), or the model's Hugging Face folder",
            )
        return UserError(f"GGUF file {path} is truncated or damaged: {first_line(broken)}", fix="download it again")
    for tensor in reader.tensors:
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            return UserError(
                f"GGUF file {path} holds tensors of a type that cannot be read: {tensor.tensor_type.name}",
                got=f"it in {tensor.name}",
                fix="use a file in another type (F16, Q8_0, Q4_K...), or the model's Hugging Face folder",
            )
    return UserError(
        f"cannot load the GGUF file {path}: {first_line(error)}", fix="give the model's Hugging Face folder instead"
    )


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""What a fine-tune changed, tensor by tensor from its folder: whole weights, or a PEFT adapter's thin factors.

A change is read from the disk when it is asked for and not kept: of a hundred fine-tunes no two are in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoquant.errors import UserError
from geoquant.runs import read_json

__all__ = ["Factors", "FolderChanges", "folder_changes"]

ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
PREFIX = "base_model.model."
MERGE = "merge the adapter into its base and give the whole model's folder"
# Entries of a configuration under which more than the two factors, or something else, is added to the base's weights.
MORE = (
    *("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "kasa_config", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "lora_bias", "use_bdlora", "arrow_config"),
)
# Initialisations that leave the base's weights as they are. Others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) take from the
# base what the factors start with: the factors are then a change of what was left of it.
BESIDE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, eq=False)
class Factors:
    """The change `scale left right` of one matrix: left (rows, rank), right (rank, columns)."""

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class FolderChanges(Mapping[str, "Tensor | Factors"]):
    """Changes from `base` by its names, in float64, as they are read from `files`. scales: of an adapter's products.

    files: per name the (file, tensor name) pairs of its parts. transposed: names whose weight is stored (in, out).
    """

    folder: Path
    base: Mapping[str, Tensor]
    files: Mapping[str, tuple[tuple[str, str], ...]]
    scales: Mapping[str, float] | None = None
    transposed: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor | Factors:
        parts = [self._read(*part) for part in self.files[name]]
        if self.scales is None:
            found = parts[0]
            if found.shape != self.base[name].shape:
                raise _unlike(self.folder, name, found.shape, self.base[name].shape)
            return found.double() - self.base[name].detach().cpu().double()
        down, up = parts
        left, right = (down.T, up.T) if name in self.transposed else (up, down)
        wanted = self.base[name].shape
        if (left.shape[0], right.shape[1]) != tuple(wanted) or left.shape[1] != right.shape[0]:
            raise _unlike(self.folder, name, (left.shape[0], right.shape[1]), wanted)
        return Factors(left.contiguous(), right.contiguous(), self.scales[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """SHA-256 of all numbers as they are stored, whatever the files are called and however they are divided."""
        found = hashlib.sha256()
        for name in sorted(self.files):
            scale = None if self.scales is None else self.scales[name]
            found.update(f"{name} {scale} {name in self.transposed}".encode())
            for part in self.files[name]:
                values = self._read(*part)
                found.update(str(tuple(values.shape)).encode())
                # In one type: a copy in a wider one holds the same numbers.
                found.update(values.double().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _read(self, file: str, tensor: str) -> Tensor:
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return opened.get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {tensor} of {self.folder / file}: {error}") from None


def folder_changes(
    folder: str | Path, base: Mapping[str, Tensor], *, tied: frozenset[str] = frozenset()
) -> FolderChanges:
    """The changes of a fine-tune's folder. base: all tensors of the public base, by the names of its module tree.

    tied: names that stand for a tensor of the base under another name; a folder may hold them once more.

    Raises UserError where the folder is none, holds tensors that the base has not, lacks some, or an adapter does more
    than add products to matrices.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        return _of_adapter(folder, base)
    names = _weight_files(folder)
    if strange := sorted(names.keys() - base.keys() - tied):
        raise UserError(
            f"{folder} holds {strange[0]}, which the public base has not ({len(strange)} such tensors)",
            fix="give fine-tunes of the very base that MODEL is",
        )
    if absent := sorted(base.keys() - names.keys()):
        raise UserError(f"{folder} lacks {absent[0]} ({len(absent)} such tensors)", fix="save the whole model")
    return FolderChanges(folder, base, {name: ((names[name], name),) for name in base})


def _weight_files(folder: Path) -> dict[str, str]:
    """Name of every tensor of a Hugging Face folder, and the file that holds it."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        return dict(read_json(index, weight_map=dict)["weight_map"])
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder} is no fine-tune", wanted=f"a folder with {WEIGHTS}, or a PEFT adapter with adapter_config.json"
        )
    return dict.fromkeys(_keys(folder / WEIGHTS), WEIGHTS)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None


def _of_adapter(folder: Path, base: Mapping[str, Tensor]) -> FolderChanges:
    """A PEFT adapter of plain LoRA: `W + alpha / r B A`, or `alpha / sqrt r` where it says so (arXiv:2106.09685)."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, alpha, rank = config["peft_type"], float(config["lora_alpha"]), int(config["r"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} is no LoRA adapter's: {error!r}", fix=MERGE) from None
    more = [key for key in MORE if config.get(key)]
    if kind != "LORA" or more or rank < 1:
        raise UserError(f"the adapter {folder} is not a plain LoRA", got=", ".join(more) or kind, fix=MERGE)
    if (start := config.get("init_lora_weights")) not in BESIDE:
        raise UserError(
            f"the adapter {folder} is a change of a base whose weights its initialisation had moved, not of the public "
            "base",
            got=f"init_lora_weights = {start!r}",
            fix="merge it where it was trained and give the whole model's folder, or save it there converted (peft: "
            "path_initial_model_for_weight_conversion)",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found: dict[str, dict[str, str]] = {}
    for key in _keys(folder / ADAPTER):
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight") or f"{module}.weight" not in base:
            raise UserError(f"the adapter {folder} holds {key}, no factor for a matrix of the base", fix=MERGE)
        found.setdefault(f"{module}.weight", {})[part[0]] = key
    if not found or any(parts.keys() != {"A", "B"} for parts in found.values()):
        raise UserError(f"the adapter {folder} lacks factors", fix="save it again")
    files = {name: ((ADAPTER, found[name]["A"]), (ADAPTER, found[name]["B"])) for name in sorted(found)}
    transposed = frozenset(found) if config.get("fan_in_fan_out") else frozenset()
    return FolderChanges(folder, base, files, dict.fromkeys(found, scale), transposed)


def _unlike(folder: Path, name: str, got: object, wanted: object) -> UserError:
    return UserError(f"{name} of {folder} has another shape than the base's", got=tuple(got), wanted=tuple(wanted))

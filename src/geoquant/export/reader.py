"""Lets `AutoModelForCausalLM.from_pretrained` read the formats `geoquant` and `int4`.

Entropy-coded matrices are int8 codes in memory, or the small form of `packed` where `quantization_config` has `runtime`
"int4"; the format `int4` holds that form already. Embeddings and heads may be coded too; a tied head multiplies with
the embedding's matrix. Registered with transformers when geoquant has been imported (see geoquant.__init__).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int, Integer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from geoquant._hook import withdraw
from geoquant.errors import UserError, unknown_name
from geoquant.export.int4 import INT4_VERSION, METHOD, PackedMatrix, blank, check_matrix, packed_module
from geoquant.export.packed import CACHED, pack, ranges
from geoquant.export.weights import tied_heads
from geoquant.lattice.rate import CLASSES
from geoquant.lattice.unboxed import steps_of

__all__ = ["CodedEmbedding", "CodedLinear", "GeoQuantConfig", "GeoQuantizer"]

RUNTIMES = ("int8", "int4")
HOLDER = "geoquant"  # of the tables while a model is loaded
ENTRY = "its entry in config.json says"
INTEGERS = {"U8": torch.uint8, "U16": torch.uint16, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
TOGETHER = 1 << 23  # codes that are decoded together: a decoder has work for several streams at a time


class Coded(nn.Module):
    """A matrix `a_i b_j Z_ij` with narrow integer codes Z and steps a (rows), b (columns).

    Z is int8; where more than one code in a hundred lies beyond, int16. What lies beyond even so is split: `overflow`
    holds the rest, one value per (row, column), row by row. Until `unpack` the module holds the tensors of the file,
    and `entry["columns"]` names the site that holds the column tensors. It computes in `dtype`.
    """

    def __init__(self, name: str, entry: dict, dtype: torch.dtype):
        super().__init__()
        self.rows, self.columns = entry["shape"]
        words, escapes, streams = entry["sizes"]
        if not isinstance(entry["columns"], str):
            raise TypeError(f"columns: {entry['columns']!r}")
        self.entry, self.dtype = entry, dtype
        shapes = {
            "words": ((words,), torch.int32),
            "escapes": ((escapes,), torch.int32),
            "streams": ((streams, 3), torch.int32),
            "row_steps": ((self.rows,), torch.uint8),
            "row_classes": ((self.rows,), torch.int8),
        }
        if entry["columns"] == name:
            shapes["column_steps"] = ((self.columns,), torch.uint8)
            shapes["column_classes"] = ((self.columns,), torch.int8)
        self.stored = tuple(shapes)
        for label, (shape, kind) in shapes.items():
            self.register_buffer(label, torch.empty(shape, dtype=kind))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file that this site has of its own."""
        return {label: getattr(self, label).cpu() for label in self.stored}

    def unpack(self, codes: Integer[Tensor, "out in"], column_steps: Int[Tensor, " in"], device: torch.device) -> None:
        """Replace the stored tensors by codes, steps and what overflows."""
        row_base, column_base = self.entry["bases"]
        row_steps = steps_of(self.row_steps.cpu().to(torch.int32) + row_base)
        for label in self.stored:
            delattr(self, label)
        self.stored = ()
        kept, overflow = split(codes, torch.int8)
        if 100 * len(overflow["overflow"]) > codes.numel():
            kept, overflow = split(codes, torch.int16)
        buffers = {
            "codes": kept,
            "row_scale": row_steps,
            "column_scale": steps_of(column_steps.to(torch.int32) + column_base),
            **overflow,
        }
        for label, tensor in buffers.items():
            self.register_buffer(label, tensor.to(device))

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 matrix."""
        values = self.codes.float()
        values[self.overflow_rows, self.overflow_columns] += self.overflow
        return values.mul_(self.row_scale[:, None]).mul_(self.column_scale)

    def project(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """`x W^T`."""
        scaled = x * self.column_scale.to(x.dtype)
        y = nn.functional.linear(scaled, self.codes.to(x.dtype))
        if len(self.overflow):
            extra = scaled[..., self.overflow_columns] * self.overflow.to(x.dtype)
            y = y.index_add(-1, self.overflow_rows, extra.to(y.dtype))
        return y * self.row_scale.to(x.dtype)

    def look_up(self, index: Int[Tensor, ...]) -> Float[Tensor, "... in"]:
        """Rows of W."""
        flat = index.flatten()
        values = self.codes[flat].float()
        first = torch.searchsorted(self.overflow_rows, flat)
        count = torch.searchsorted(self.overflow_rows, flat, right=True) - first
        if count.any():
            place = torch.repeat_interleave(count)
            entry = torch.arange(len(place), device=flat.device) + (first + count - count.cumsum(0))[place]
            values[place, self.overflow_columns[entry]] += self.overflow[entry]
        values = values.mul_(self.row_scale[flat][:, None]).mul_(self.column_scale)
        return values.to(self.dtype).view(*index.shape, self.columns)


def split(codes: Integer[Tensor, "out in"], kind: torch.dtype) -> tuple[Integer[Tensor, "out in"], dict[str, Tensor]]:
    """Codes clamped to a type, and what overflows: some rows at a time, so that they stay in a core's cache."""
    limits, kept = torch.iinfo(kind), torch.empty(codes.shape, dtype=kind)
    places, rest = [], []
    for first, last in ranges(len(codes), CACHED, codes.shape[1]):
        part = codes[first:last]
        clamped = part.clamp(limits.min, limits.max)
        kept[first:last] = clamped
        rows, columns = torch.nonzero(part != clamped, as_tuple=True)
        places.append(torch.stack([rows + first, columns]))
        rest.append((part[rows, columns] - clamped[rows, columns]).float())
    rows, columns = torch.cat(places, dim=1)
    return kept, {"overflow_rows": rows, "overflow_columns": columns, "overflow": torch.cat(rest)}


class CodedLinear(Coded):
    """A linear map `y = W x + bias`."""

    def __init__(self, name: str, entry: dict, linear: nn.Linear):
        super().__init__(name, entry, linear.weight.dtype)
        self.out_features, self.in_features = entry["shape"]
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.project(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class CodedEmbedding(Coded):
    """A lookup of rows."""

    def __init__(self, name: str, entry: dict, embedding: nn.Embedding):
        super().__init__(name, entry, embedding.weight.dtype)
        self.num_embeddings, self.embedding_dim = entry["shape"]
        self.padding_idx = embedding.padding_idx

    def forward(self, index: Int[Tensor, ...]) -> Float[Tensor, "... in"]:
        return self.look_up(index)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class TiedHead(nn.Module):
    """A head that multiplies with the embedding's matrix and owns nothing but its bias."""

    def __init__(self, embedding: CodedEmbedding | PackedMatrix, linear: nn.Linear):
        super().__init__()
        self.tied = (embedding,)  # in a tuple: not a submodule, whose buffers would count twice
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 matrix."""
        return self.tied[0].dequantize()

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.tied[0].project(x)
        return y if self.bias is None else y + self.bias


withdraw()  # of what stood for this reader while it could not be imported


@register_quantization_config(METHOD)
class GeoQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint in the format `geoquant` or `int4`.

    runtime: what entropy-coded matrices are in memory, int8 or int4. It is no part of the file: readers set it.
    """

    def __init__(
        self,
        version: int = 2,
        sites: dict | None = None,
        tables: int = 0,
        tied: dict | None = None,
        runtime: str = "int8",
        **kwargs: object,
    ):
        self.quant_method = METHOD
        self.version, self.sites, self.tables, self.tied = version, sites or {}, tables, tied or {}
        self.runtime = runtime


@register_quantizer(METHOD)
class GeoQuantizer(HfQuantizer):
    """Puts modules that hold codes in place of coded sites before loading, and makes them ready after it."""

    requires_calibration = True

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Refuse files of a later version, and runtime forms that nobody knows."""
        version = self.quantization_config.version
        if not isinstance(version, int) or version < 1:
            raise UserError(f"config.json names no version of the format geoquant (got {version!r})")
        if version > INT4_VERSION:
            raise UserError(
                f"this checkpoint has version {version} of the format geoquant, "
                f"this geoquant reads up to {INT4_VERSION}: upgrade it"
            )
        if self.quantization_config.runtime not in RUNTIMES:
            raise unknown_name("runtime", str(self.quantization_config.runtime), RUNTIMES)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: object
    ) -> None:
        settings = self.quantization_config
        try:
            check_tied(model, settings.sites, settings.tied)
            for name, entry in settings.sites.items():
                self.replace_site(model, name, entry)
            for name, source in settings.tied.items():
                replace(model, name, TiedHead(model.get_submodule(source), model.get_submodule(name)))
                # Nothing is left that transformers could tie, now or when asked to do it again.
                model.all_tied_weights_keys, model._tied_weights_keys = {}, None
            if settings.version != INT4_VERSION:
                holder = nn.Module()
                holder.register_buffer("tables", torch.empty(settings.tables, dtype=torch.uint16))
                holder.register_buffer("reaches", torch.empty(CLASSES, dtype=torch.int16))
                model.geoquant = holder
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"config.json of {model.name_or_path} does not describe this model: {error}",
                fix="copy the checkpoint again",
            ) from None
        check_stored(model, checkpoint_files or (), {*settings.sites, HOLDER})

    def replace_site(self, model: nn.Module, name: str, entry: dict) -> None:
        """Put an empty module for codes where `name` is. Raises UserError where its entry is not one."""
        module = model.get_submodule(name)
        try:
            if self.quantization_config.version == INT4_VERSION:
                coded = packed_module(module, blank(entry), module.weight.dtype)
            else:
                coded = (CodedEmbedding if isinstance(module, nn.Embedding) else CodedLinear)(name, entry, module)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(name, model, f"{ENTRY} {error!r}") from None
        replace(model, name, coded)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        if self.quantization_config.version == INT4_VERSION:
            for name, entry in self.quantization_config.sites.items():
                site = model.get_submodule(name)
                site.refresh()
                try:
                    check_matrix(entry, site.matrix)
                except ValueError as error:
                    raise damaged(name, model, error) from None
            return
        try:
            # The form int4 needs no decoder.
            from geoquant.export.matrices import decode
            from geoquant.export.native import read_tables, stored_matrix
        except ImportError as error:
            what = f"decoding {model.name_or_path} needs the package {error.name!r}"
            raise UserError(what, fix=f"run: pip install {error.name}") from None
        try:
            lookup = read_tables(model.geoquant.tables.cpu(), model.geoquant.reaches.cpu()).lookup()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"geoquant.tables of {model.name_or_path} is damaged: {error}", fix="copy the checkpoint again"
            ) from None
        del model.geoquant
        sites = {name: model.get_submodule(name) for name in self.quantization_config.sites}
        columns = {
            name: {label: tensor for label, tensor in site.tensors().items() if label.startswith("column")}
            for name, site in sites.items()
            if "column_steps" in site.stored
        }

        def unpack(names: list[str]) -> None:
            for name, codes in zip(names, decoded(names)):
                site = sites[name]
                shared, device = columns[site.entry["columns"]], site.words.device
                if self.quantization_config.runtime == "int4":
                    rows, base = (site.row_steps.cpu(), shared["column_steps"]), site.entry["bases"]
                    exponents = (steps.to(torch.int32) + least for steps, least in zip(rows, base))
                    replace(model, name, packed_module(site, pack(codes, *exponents), site.dtype).to(device))
                else:
                    site.unpack(codes, shared["column_steps"], device)

        def decoded(names: list[str]) -> list[Tensor]:
            matrices = []
            try:
                for name in names:
                    own, entry = sites[name].tensors(), sites[name].entry
                    matrices.append(stored_matrix(own | columns[entry["columns"]], entry))
                return [torch.from_numpy(codes) for codes in decode(matrices, lookup)]
            except KeyError as error:
                raise damaged(name, model, f"{ENTRY} nothing of {error}") from None
            except ValueError as error:
                if len(matrices) == len(names) > 1:  # one of them does not fit its streams
                    return [codes for name in names for codes in decoded([name])]
                raise damaged(name, model, error) from None

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the decoder lets go of the interpreter
            list(pool.map(unpack, batches({name: site.rows * site.columns for name, site in sites.items()}, TOGETHER)))
        for name, source in self.quantization_config.tied.items():
            model.get_submodule(name).tied = (model.get_submodule(source),)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def batches(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, in lists whose sizes reach `most` together; the rest in a last one."""
    found, total = [[]], 0
    for name, size in sizes.items():
        found[-1].append(name)
        total += size
        if total >= most:
            found, total = [*found, []], 0
    return [names for names in found if names]


def damaged(name: str, model: nn.Module, error: object) -> UserError:
    """A layer that is not what was written."""
    return UserError(f"layer {name} of {model.name_or_path} is damaged: {error}", fix="copy the checkpoint again")


def check_tied(model: nn.Module, sites: Collection[str], tied: Mapping[str, str]) -> None:
    """Raise ValueError where the tied heads are not those of the model: they would multiply with another matrix."""
    ties, wanted = tied_heads(model, {*sites, *tied.values()}), tied_heads(model, sites)
    if any(ties.get(name) != source for name, source in tied.items()) or not wanted.keys() <= tied.keys():
        raise ValueError(f"it ties {json.dumps(tied)}, the model {json.dumps(wanted)}")


def check_stored(model: nn.Module, files: Iterable[str], owners: Collection[str]) -> None:
    """Raise UserError where the files are not what the model with its coded matrices reads: cut short, or a tensor
    absent or of another shape or type. Only their headers are read; transformers would say less, or nothing.

    owners: modules whose tensors must all be there. What else is absent transformers tells.
    """
    found, again = {}, "copy the checkpoint again"
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                pieces = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                found |= {name: (file, [*piece.get_shape()], piece.get_dtype()) for name, piece in pieces.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights file {file} is truncated or damaged: {error}", fix=again) from None
    wanted = model.state_dict() if found else {}
    for name, tensor in wanted.items():
        if name not in found:
            if name.rpartition(".")[0] in owners:
                raise UserError(f"tensor {name} is missing from {model.name_or_path}", fix=again)
            continue
        file, shape, kind = found[name]
        if shape != [*tensor.shape]:
            raise UserError(f"tensor {name} in {file} has shape {shape}", wanted=[*tensor.shape], fix=again)
        if not tensor.is_floating_point() and INTEGERS.get(kind) != tensor.dtype:
            raise UserError(f"tensor {name} in {file} has type {kind}", wanted=tensor.dtype, fix=again)
    for name in sorted(found.keys() - wanted.keys()):
        if f"{name.rpartition('.')[0]}.weight" in wanted:
            raise UserError(f"config.json of {model.name_or_path} does not know tensor {name}", fix=again)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)

"""Lets `AutoModelForCausalLM.from_pretrained` read the format `geoquant`, weights in memory as int8 codes.

Registered with transformers when geoquant has been imported (see geoquant.__init__).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from geoquant.export.native import METHOD, VERSION, decode_site, read_tables
from geoquant.lattice.rate import CLASSES
from geoquant.lattice.unboxed import steps_of

__all__ = ["CodedLinear", "GeoQuantConfig", "GeoQuantizer"]


class CodedLinear(nn.Module):
    """A linear map `y = a * ((b * x) Z^T) + bias` with int8 codes Z and steps a (rows), b (columns).

    Codes beyond int8 are split: Z holds what fits, `overflow` the rest, one value per (row, column). Until `unpack`
    the module holds the tensors of the file, and `columns` names the site that holds the column tensors.
    """

    def __init__(self, name: str, entry: dict, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = entry["shape"]
        words, escapes, streams = entry["sizes"]
        self.entry = entry
        shapes = {
            "words": ((words,), torch.int32),
            "escapes": ((escapes,), torch.int32),
            "streams": ((streams, 3), torch.int32),
            "row_steps": ((self.out_features,), torch.uint8),
            "row_classes": ((self.out_features,), torch.int8),
        }
        if entry["columns"] == name:
            shapes["column_steps"] = ((self.in_features,), torch.uint8)
            shapes["column_classes"] = ((self.in_features,), torch.int8)
        self.stored = tuple(shapes)
        for label, (shape, dtype) in shapes.items():
            self.register_buffer(label, torch.empty(shape, dtype=dtype))
        self.bias = bias

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file that this site has of its own."""
        return {label: getattr(self, label).cpu() for label in self.stored}

    def unpack(self, codes: Int[Tensor, "out in"], column_steps: Int[Tensor, " in"], device: torch.device) -> None:
        """Replace the stored tensors by int8 codes, steps and what overflows."""
        row_base, column_base = self.entry["bases"]
        row_steps = steps_of(self.row_steps.cpu().to(torch.int32) + row_base)
        for label in self.stored:
            delattr(self, label)
        self.stored = ()
        kept = codes.clamp(-128, 127)
        rows, columns = torch.nonzero(codes != kept, as_tuple=True)
        buffers = {
            "codes": kept.to(torch.int8),
            "row_scale": row_steps,
            "column_scale": steps_of(column_steps.to(torch.int32) + column_base),
            "overflow_rows": rows,
            "overflow_columns": columns,
            "overflow": (codes - kept)[rows, columns].float(),
        }
        for label, tensor in buffers.items():
            self.register_buffer(label, tensor.to(device))

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 weight."""
        values = self.codes.float()
        values[self.overflow_rows, self.overflow_columns] += self.overflow
        return values.mul_(self.row_scale[:, None]).mul_(self.column_scale)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        scaled = x * self.column_scale.to(x.dtype)
        y = nn.functional.linear(scaled, self.codes.to(x.dtype))
        if len(self.overflow):
            extra = scaled[..., self.overflow_columns] * self.overflow.to(x.dtype)
            y = y.index_add(-1, self.overflow_rows, extra.to(y.dtype))
        y = y * self.row_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@register_quantization_config(METHOD)
class GeoQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint in the format `geoquant`."""

    def __init__(self, version: int = VERSION, sites: dict | None = None, tables: int = 0, **kwargs: object):
        self.quant_method = METHOD
        self.version, self.sites, self.tables = version, sites or {}, tables


@register_quantizer(METHOD)
class GeoQuantizer(HfQuantizer):
    """Puts `CodedLinear` in place of coded sites before loading, and decodes them after it."""

    requires_calibration = True

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Refuse files of a later version."""
        if self.quantization_config.version > VERSION:
            raise ValueError(
                f"this checkpoint has version {self.quantization_config.version} of the format geoquant, "
                f"this geoquant reads up to {VERSION}: upgrade it"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        for name, entry in self.quantization_config.sites.items():
            parent, _, last = name.rpartition(".")
            linear = model.get_submodule(name)
            setattr(model.get_submodule(parent), last, CodedLinear(name, entry, linear.bias))
        holder = nn.Module()
        holder.register_buffer("tables", torch.empty(self.quantization_config.tables, dtype=torch.uint16))
        holder.register_buffer("reaches", torch.empty(CLASSES, dtype=torch.int16))
        model.geoquant = holder

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        try:
            tables = read_tables(model.geoquant.tables.cpu(), model.geoquant.reaches.cpu())
            models = tables.models()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"geoquant.tables is damaged: {error}; copy the checkpoint again") from None
        del model.geoquant
        sites = {name: model.get_submodule(name) for name in self.quantization_config.sites}
        columns = {
            name: {label: tensor for label, tensor in site.tensors().items() if label.startswith("column")}
            for name, site in sites.items()
            if "column_steps" in site.stored
        }
        for name, site in sites.items():
            shared = columns[site.entry["columns"]]
            device = site.words.device
            try:
                codes = decode_site(site.tensors() | shared, site.entry, tables, models)
            except (ValueError, KeyError) as error:
                raise ValueError(f"layer {name} is damaged: {error}; copy the checkpoint again") from None
            site.unpack(codes, shared["column_steps"], device)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

"""The format `int4`: the small runtime form as a file, loaded without entropy decoding; and the modules that hold it.

The tensors of the file are those in memory (`packed.Packed`), so loading is reading. docs/formats.md holds the layout;
`geoquant.export.reader` reads it, and makes the same modules of entropy-coded files when asked to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.export.packed import WIDTHS, Packed, pack, place_type
from geoquant.export.weights import ExportResult, write_coded
from geoquant.methods.problem import LatticeSolution
from geoquant.model.walk import Block

__all__ = ["INT4_VERSION", "METHOD", "PackedEmbedding", "PackedLinear", "PackedMatrix", "export_int4", "footprint"]

METHOD = "geoquant"  # what config.json calls the quantization
INT4_VERSION = 3  # versions 1 and 2 hold entropy-coded matrices


class PackedMatrix(nn.Module):
    """A matrix in the runtime form; its tensors are the buffers. Computes in `dtype`."""

    def __init__(self, matrix: Packed, dtype: torch.dtype):
        super().__init__()
        self.rows, self.columns, self.dtype = len(matrix.dense), matrix.columns, dtype
        for name, tensor in matrix.tensors.items():
            self.register_buffer(name, tensor)
        self.matrix = matrix

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(function, recurse)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Look at the buffers anew."""
        tensors = {name: getattr(self, name) for name in self.matrix.tensors}
        self.matrix = Packed(self.matrix.width, self.columns, **tensors)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 matrix."""
        return self.matrix.rows(slice(None))

    def project(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """`x W^T`."""
        return self.matrix.multiply(x)

    def extra_repr(self) -> str:
        share = len(self.places) / max(1, self.rows * self.columns)
        return f"{self.columns} -> {self.rows}, {self.matrix.width} bits, {share:.2%} beyond"


class PackedLinear(PackedMatrix):
    """A linear map `y = W x + bias`."""

    def __init__(self, matrix: Packed, dtype: torch.dtype, bias: nn.Parameter | None):
        super().__init__(matrix, dtype)
        self.out_features, self.in_features = self.rows, self.columns
        self.bias = bias

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.project(x)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedMatrix):
    """A lookup of rows."""

    def __init__(self, matrix: Packed, dtype: torch.dtype, padding_idx: int | None):
        super().__init__(matrix, dtype)
        self.num_embeddings, self.embedding_dim = self.rows, self.columns
        self.padding_idx = padding_idx

    def forward(self, index: Int[Tensor, ...]) -> Float[Tensor, "... in"]:
        rows = self.matrix.rows(index.flatten())
        return rows.to(self.dtype).view(*index.shape, self.columns)


def packed_module(module: nn.Module, matrix: Packed, dtype: torch.dtype) -> PackedMatrix:
    """What takes the place of `module`: an embedding or a linear layer, coded or not."""
    if hasattr(module, "embedding_dim"):
        return PackedEmbedding(matrix, dtype, module.padding_idx)
    return PackedLinear(matrix, dtype, module.bias)


def footprint(model: nn.Module) -> dict[str, int]:
    """Of all matrices in the runtime form: weights, their bytes, codes beyond the dense part, and weights by width."""
    forms = [module.matrix for module in model.modules() if isinstance(module, PackedMatrix)]
    counts = [(form.width, len(form.dense) * form.columns) for form in forms]
    return {
        "weights": sum(weights for _, weights in counts),
        "bytes": sum(form.nbytes for form in forms),
        "beyond": sum(len(form.places) for form in forms),
        **{f"width_{width}": sum(weights for own, weights in counts if own == width) for width in WIDTHS},
    }


def export_int4(
    model: nn.Module,
    tokenizer: object,
    blocks: tuple[Block, ...],
    stages: Mapping[str, LatticeSolution],
    out: Path,
    **options: object,
) -> tuple[ExportResult, int]:
    """Write `out`, whose coded matrices are in the runtime form; what was written, and how many codes lie in sparse
    lists.

    stages: solutions by stage name, read one at a time. options: of `write_coded`.
    """
    sites: dict[str, dict] = {}

    def coded() -> Iterator[tuple[str, Tensor]]:
        for stage in (stage for block in blocks for stage in block.stages):
            solution, start = stages[stage.name], 0
            for site in stage.sites:
                rows = slice(start, start + site.shape[0])
                start = rows.stop
                matrix = pack(solution.codes[rows], solution.row_exponents[rows], solution.column_exponents)
                sites[site.name] = described(matrix)
                for name, tensor in matrix.tensors.items():
                    yield f"{site.name}.{name}", tensor

    settings = {"quant_method": METHOD, "version": INT4_VERSION}
    written = write_coded(out, model, tokenizer, coded(), sites, settings, **options)
    return written, sum(entry["beyond"] for entry in sites.values())


def described(matrix: Packed) -> dict:
    """What config.json says of a matrix."""
    entry = {
        "shape": [len(matrix.dense), matrix.columns],
        "width": matrix.width,
        "beyond": len(matrix.places),
        "excess": str(matrix.excess.dtype).removeprefix("torch."),
    }
    return entry | {"crc32": checksum(entry, matrix)}


def blank(entry: Mapping) -> Packed:
    """A matrix of the described shapes whose tensors are to be read.

    Raises KeyError, TypeError, ValueError or RuntimeError where the entry describes none.
    """
    (rows, columns), width, count = map(int, entry["shape"]), int(entry["width"]), int(entry["beyond"])
    kinds = {str(kind).removeprefix("torch."): kind for kind in WIDTHS.values() if kind is not torch.uint8}
    dense, excess = WIDTHS[width], kinds[entry["excess"]]
    shape = rows, -(-columns // 2) if width == 4 else columns
    return Packed(
        width=width,
        columns=columns,
        dense=torch.empty(shape, dtype=dense),
        pointers=torch.empty(rows + 1, dtype=torch.int32),
        places=torch.empty(count, dtype=place_type(columns)),
        excess=torch.empty(count, dtype=excess),
        row_steps=torch.empty(rows, dtype=torch.int16),
        column_steps=torch.empty(columns, dtype=torch.int16),
    )


def check_matrix(entry: Mapping, matrix: Packed) -> None:
    """Raise ValueError where what was read is not what was written."""
    if checksum(entry, matrix) != entry.get("crc32"):
        raise ValueError("the checksum does not match")
    matrix.check()


def checksum(entry: Mapping, matrix: Packed) -> int:
    """CRC-32 over shape and width, as text, and the bytes of the tensors."""
    value = zlib.crc32(json.dumps([entry["shape"], entry["width"]]).encode())
    for tensor in matrix.tensors.values():
        value = zlib.crc32(tensor.cpu().contiguous().numpy(), value)
    return value

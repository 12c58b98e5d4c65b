"""The `pack-quantized` format of compressed-tensors: integer codes in words, loaded by stock transformers.

Per site: `weight_packed` int32 (out, ceil(in*w/32)), `weight_scale` bfloat16 (out, groups), `weight_shape`
int64 (2,); the value of a weight is `code * scale` with a signed code of w bits. Three choices keep every
file loadable (docs/formats.md has the measurements behind them):

- w is 2, 4 or 8. Other widths straddle word borders, and their packing changed between reader versions.
- Zero points are folded into the codes, `code - zero_point`, which costs one bit of range: stock transformers
  cannot load a packed zero point.
- A remainder group is written with the largest group size that divides both, its scales repeated: readers
  warn about a remainder while loading and fail at the first forward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.export.weights import (
    MAX_SHARD_BYTES,
    ExportResult,
    chosen_dtype,
    linear_site,
    summarize,
    tied_weights,
    untouched,
    write_shards,
    write_side_files,
)
from geoquant.lattice.grid import Grid
from geoquant.methods.problem import Solution
from geoquant.runs import atomic_directory

__all__ = ["export_compressed_tensors", "pack", "refuse_or_note", "stored_bits", "word_bits"]

# Below this, repeated scales cost two bits per weight and more.
SMALLEST_GROUP = 8

Scheme = tuple[int, int]  # (bits per word, group size in the file; -1: one group per row)


def word_bits(grid: Grid) -> int:
    """Bits a code of this grid occupies in the file: 2, 4 or 8.

    Raises UserError where no loadable form exists.
    """
    needed = grid.bits if grid.symmetric else grid.bits + 1
    if needed > 8:
        raise UserError(
            "compressed-tensors words cannot hold 8-bit asymmetric codes",
            wanted="at most 7 asymmetric or 8 symmetric bits",
            fix="choose symmetric codes or --format dense",
        )
    return next(width for width in (2, 4, 8) if width >= needed)


def file_group(grid: Grid, columns: int) -> int:
    """Group size in the file: the grid's if it divides the row, a common divisor if not, -1 for one group per
    row.
    """
    if grid.group_size >= columns:
        return -1
    return math.gcd(grid.group_size, columns)


def stored_bits(grid: Grid, columns: int) -> float:
    """Bits per weight on disk, scales included. More than `grid.bits_per_weight` where codes do not fill
    their word.
    """
    group = file_group(grid, columns)
    return word_bits(grid) + 16 / (columns if group < 0 else group)


def refuse(name: str, module: nn.Linear, grid: Grid) -> None:
    """Raise UserError if stock readers would not load site `name` with this grid."""
    word_bits(grid)
    columns, size = module.in_features, grid.group_size
    if 0 <= file_group(grid, columns) < min(SMALLEST_GROUP, size):
        divisor = max(candidate for candidate in range(1, size + 1) if columns % candidate == 0)
        raise UserError(
            f"group size {size} does not divide the {columns} columns of {name}",
            wanted=f"a group size that shares a divisor of at least {SMALLEST_GROUP} with {columns}",
            fix=f"choose --group-size {divisor} or --format dense",
        )


def refuse_or_note(model: nn.Module, grids: Mapping[str, Grid]) -> tuple[str, ...]:
    """Raise UserError for the first site stock readers would not load; else notes on what the file costs."""
    modules, tied = dict(model.named_modules()), tied_weights(model)
    notes: Counter[str] = Counter()
    for name, grid in grids.items():
        module = linear_site(name, modules, tied, "compressed-tensors")
        refuse(name, module, grid)
        columns = module.in_features
        group, word = file_group(grid, columns), word_bits(grid)
        if word != grid.bits:
            kind = "symmetric" if grid.symmetric else "asymmetric"
            notes[f"{grid.bits}-bit {kind} codes are stored in {word}-bit words"] += 1
        if group not in (-1, grid.group_size):
            notes[
                f"group size {grid.group_size} does not divide {columns} columns; "
                f"written as groups of {group} with repeated scales"
            ] += 1
    return tuple(f"{count} sites: {note}" for note, count in notes.items())


def pack(codes: Int[Tensor, "out in"], bits: int) -> Int[Tensor, "out words"]:
    """Signed int8 codes of 2, 4 or 8 bits into int32 words: code j of a row sits, plus 2^(bits-1), at bit
    j*bits.

    Rows are padded with zero bits to whole words; bytes are little-endian, as safetensors stores them.
    """
    half = 1 << (bits - 1)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8, got {codes.dtype}")
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise ValueError(f"codes exceed {bits} signed bits: {int(codes.min())}..{int(codes.max())}")
    shifted = codes.contiguous().view(torch.uint8) + half  # wraps modulo 256, which is the signed sum
    shifted = nn.functional.pad(shifted, (0, -shifted.shape[1] % (32 // bits)))
    in_byte = 8 // bits
    packed = shifted[:, ::in_byte].clone()
    for place in range(1, in_byte):
        packed |= shifted[:, place::in_byte] << (bits * place)
    return packed.view(torch.int32)


def signed_codes(solution: Solution) -> Int[Tensor, "out in"]:
    """Codes relative to zero as int8: asymmetric ones lose their zero point (it is no longer needed to
    decode).
    """
    if solution.zero_points is None:
        return solution.codes.to(torch.int8)
    columns = solution.codes.shape[1]
    zero = solution.zero_points.to(torch.int16).repeat_interleave(solution.grid.group_size, dim=1)[:, :columns]
    return (solution.codes.to(torch.int16) - zero).to(torch.int8)


def file_scales(solution: Solution) -> Float[Tensor, "out groups"]:
    """Scales at the file's group size: each of the grid's groups becomes one or more of the file's."""
    columns, size = solution.codes.shape[1], solution.grid.group_size
    group = file_group(solution.grid, columns)
    if group in (-1, size):
        return solution.scales
    return solution.scales[:, torch.arange(columns // group) * group // size]


def site_tensors(name: str, solution: Solution) -> dict[str, Tensor]:
    """The three tensors of one site, under their names in the file."""
    return {
        f"{name}.weight_packed": pack(signed_codes(solution), word_bits(solution.grid)),
        f"{name}.weight_scale": file_scales(solution),
        f"{name}.weight_shape": torch.tensor(solution.codes.shape, dtype=torch.int64),
    }


def quantization_config(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict:
    """The `quantization_config` of config.json: one group per distinct scheme.

    With a single scheme the target is the class `Linear` and the rest is ignored by name, which is what most
    readers expect; with several, each group lists its sites.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)

    def weights(scheme: Scheme) -> dict:
        bits, group = scheme
        return {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group < 0 else "group",
            "group_size": group if group > 0 else None,
            "dynamic": False,
        }

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in schemes],
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "format": "pack-quantized",
                "weights": weights(scheme),
                "input_activations": None,
                "output_activations": None,
            }
            for index, (scheme, names) in enumerate(groups.items())
        },
    }


def export_compressed_tensors(
    model: nn.Module,
    tokenizer: object,
    solutions: Mapping[str, Solution] | Iterable[tuple[str, Solution]],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Write `out` so that `AutoModelForCausalLM.from_pretrained(out)` gives the dequantized model, without
    GeoQuant.

    solutions: per site name; a lazy mapping or generator is read once, one site at a time. Kept columns are
    written as zeros: they belong to `adapter.export_adapter`. dtype: of all tensors a run did not touch
    (default: as in the model). replaced: parameters that take the place of the model's, by name. Raises UserError
    for what `refuse` refuses, and when the disk is full.
    """
    dtype = chosen_dtype(model, dtype)
    modules, tied = dict(model.named_modules()), tied_weights(model)
    schemes: dict[str, Scheme] = {}
    linear = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal linear
        for name, solution in solutions.items() if isinstance(solutions, Mapping) else solutions:
            refuse(name, linear_site(name, modules, tied, "compressed-tensors"), solution.grid)
            if tuple(solution.codes.shape) != tuple(modules[name].weight.shape):
                raise ValueError(f"{name}: codes {tuple(solution.codes.shape)}, {tuple(modules[name].weight.shape)}")
            schemes[name] = (word_bits(solution.grid), file_group(solution.grid, solution.codes.shape[1]))
            for key, tensor in site_tensors(name, solution).items():
                linear += tensor.nbytes
                yield key, tensor
        yield from untouched(model, schemes, dtype, replaced)

    with atomic_directory(out) as folder:
        write_shards(folder, tensors(), max_shard_bytes)
        write_side_files(folder, model, tokenizer, dtype, quantization_config(model, schemes))
    return summarize(out, linear)

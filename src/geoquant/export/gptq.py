"""The GPTQ checkpoint: codes packed down the input columns, loaded by GPTQModel, transformers (with it) and others.

Per site with weight (out, in) and groups of g columns: `qweight` int32 (ceil(in*w/32), out), `qzeros` int32
(groups, ceil(out*w/32)), `scales` float16 (groups, out), `g_idx` int32 (in,) with `g_idx[j] = j // g`; the value of a
weight is `scale * (code - zero)`. Four choices (docs/formats.md has the measurements behind them):

- One scheme for the whole model, the only thing that every reader understands: the widest codes, and a group size that
  divides those of all sites. Narrower codes and larger groups mean the same numbers in it.
- w is 2, 3, 4 or 8: the other widths have no layout that readers agree on.
- Symmetric codes are stored as code + 2^(w-1), with that zero point everywhere.
- Zero points are stored minus one (`checkpoint_format` "gptq", which every reader knows) where all codes are symmetric;
  a zero point of 0 would wrap there, so a file with asymmetric codes stores them as they are ("gptq_v2").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Integer
from torch import Tensor, nn

from geoquant import __version__
from geoquant.errors import UserError
from geoquant.export.steps import Rounding, half_steps
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
from geoquant.runs import atomic_directory, write_json

__all__ = ["Scheme", "export_gptq", "pack", "refuse_or_note", "scheme_of"]

WIDTHS = (2, 3, 4, 8)
GROUPS = (1024, 512, 256, 128, 64, 32, 16)  # what readers' kernels are written for


@dataclass(frozen=True)
class Scheme:
    """What one GPTQ file stores every site in. `group_size` -1: one group per row."""

    bits: int
    group_size: int
    symmetric: bool

    def groups(self, columns: int) -> int:
        """Number of groups of a row; the last one may be shorter."""
        return 1 if self.group_size < 0 else -(-columns // self.group_size)

    def stored_bits(self, rows: int, columns: int) -> float:
        """Bits per weight on disk: codes, steps, zero points and `g_idx`."""
        return self.bits + (16 + self.bits) * self.groups(columns) / columns + 32 / rows


Site = tuple[Grid, int, int]  # grid, rows, columns


def scheme_of(sites: Iterable[Site]) -> Scheme:
    """The narrowest scheme that holds all sites exactly.

    Raises UserError where the group sizes have no common divisor that readers know.
    """
    sites = tuple(sites)
    bits = next(width for width in WIDTHS if width >= max(grid.bits for grid, _, _ in sites))
    if bits == 3 and any(rows % 32 or columns % 32 for _, rows, columns in sites):
        bits = 4  # readers take three words at a time
    return Scheme(bits, _group(sites), all(grid.symmetric for grid, _, _ in sites))


def _group(sites: tuple[Site, ...]) -> int:
    sizes = [grid.group_size for grid, _, columns in sites if grid.group_size < columns]
    if not sizes:
        return -1
    common = math.gcd(*sizes)
    known = [size for size in GROUPS if common % size == 0]
    if not known:
        raise UserError(
            "GPTQ readers know groups of 16, 32, 64 ... 1024 columns only",
            got=" and ".join(str(size) for size in sorted(set(sizes))),
            fix="choose --group-size 32 or 64, or --format dense",
        )
    # Many kernels refuse a remainder; repeating a step in smaller groups avoids it and changes no value.
    return next((size for size in known if all(columns % size == 0 for _, _, columns in sites)), known[0])


def refuse_or_note(model: nn.Module, grids: Mapping[str, Grid]) -> tuple[str, ...]:
    """Raise UserError for the first site a GPTQ file cannot hold; else notes on what the file costs."""
    modules, tied, head = dict(model.named_modules()), tied_weights(model), model.get_output_embeddings()
    for name in grids:
        if linear_site(name, modules, tied, "GPTQ") is head:
            raise UserError(
                f"GPTQ readers keep the vocabulary projection ({name}) as it is", fix="leave it unquantized"
            )
    scheme = scheme_of((grid, *modules[name].weight.shape) for name, grid in grids.items())
    notes = []
    if any(grid.bits != scheme.bits for grid in grids.values()):
        narrow = "/".join(str(bits) for bits in sorted({grid.bits for grid in grids.values()} - {scheme.bits}))
        why = "" if scheme.bits == 8 or narrow != "3" else ": 3-bit words need rows and columns in multiples of 32"
        notes.append(f"{narrow}-bit codes are stored in {scheme.bits} bits{why}")
    sizes = {min(grid.group_size, modules[name].in_features) for name, grid in grids.items()}
    if scheme.group_size > 0 and sizes != {scheme.group_size}:
        notes.append(f"groups are written as groups of {scheme.group_size} columns with repeated steps")
    rest = [name for name in grids if scheme.group_size > 0 and modules[name].in_features % scheme.group_size]
    if rest:
        notes.append(
            f"groups of {scheme.group_size} do not divide the {modules[rest[0]].in_features} columns of {rest[0]}: "
            "GPTQModel's torch kernel reads that, most other kernels refuse it"
        )
    return tuple(notes)


def pack(codes: Integer[Tensor, "n m"], bits: int) -> Int[Tensor, "words m"]:
    """Unsigned codes of `bits` bits into ceil(n*bits/32) int32 words, down the first dimension.

    The codes of a column form one stream of bits, code j at bit j*bits, least significant first, cut into words of
    32; a 3-bit code may straddle two words. What is left of the last word is zero.
    """
    count, width = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes exceed {bits} unsigned bits: {int(codes.min())}..{int(codes.max())}")
    codes = nn.functional.pad(codes, (0, 0, 0, -count % 32)).view(-1, 32, width)
    words = torch.zeros(codes.shape[0], bits, width, dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        code = codes[:, place].to(torch.int64)
        words[:, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    # int32 holds the same 32 bits; the cast takes the lower half of the 64-bit word.
    return words.view(-1, width)[: -(-count * bits // 32)].to(torch.int32)


def site_tensors(name: str, solution: Solution, scheme: Scheme) -> tuple[dict[str, Tensor], Rounding]:
    """The four tensors of one site under their names in the file, and what float16 did to its steps."""
    columns, size = solution.codes.shape[1], solution.grid.group_size
    middle = 1 << (scheme.bits - 1)
    codes = solution.codes.to(torch.int16)
    if solution.zero_points is None:
        codes = codes + middle
        zeros = torch.full(solution.scales.shape, middle, dtype=torch.int16)
    else:
        zeros = solution.zero_points.to(torch.int16)
    group = torch.arange(columns) // size
    reach = torch.zeros(solution.scales.shape).scatter_reduce_(
        1, group.expand(codes.shape), (codes - zeros[:, group]).abs().float(), "amax"
    )
    scales, rounding = half_steps(name, solution.scales, reach)
    if scheme.group_size > 0:  # each of the grid's groups becomes one or more of the file's
        file_groups = torch.arange(scheme.groups(columns)) * scheme.group_size // size
        scales, zeros = scales[:, file_groups], zeros[:, file_groups]
    stored = zeros - 1 if scheme.symmetric else zeros
    index = torch.arange(columns) // (columns if scheme.group_size < 0 else scheme.group_size)
    tensors = {
        f"{name}.qweight": pack(codes.T, scheme.bits),
        f"{name}.qzeros": pack(stored, scheme.bits).T,
        f"{name}.scales": scales.T,
        f"{name}.g_idx": index.to(torch.int32),
    }
    return tensors, rounding


def quantization_config(scheme: Scheme, skipped: Iterable[str], quantized: Iterable[str]) -> dict:
    """The `quantization_config` of config.json, which is also quantize_config.json.

    skipped: linear layers beside quantized ones that a reader must leave alone. GPTQModel takes them from `dynamic`,
    transformers and optimum from the list of those that are quantized.
    """
    layout = "gptq" if scheme.symmetric else "gptq_v2"
    config = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"geoquant:{__version__}"]},
    }
    skipped = [*skipped]
    if skipped:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
        config["modules_in_block_to_quantize"] = [[*quantized]]
    return config


def export_gptq(
    model: nn.Module,
    tokenizer: object,
    solutions: Mapping[str, Solution],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Write `out` so that GPTQModel, or transformers where it is installed, gives the dequantized model.

    solutions: per site name, read twice (once for the scheme, once for the tensors), one site at a time. Kept columns
    are written as zeros: they belong to `adapter.export_adapter`. dtype: of all tensors a run did not touch (default:
    as in the model). replaced: parameters that take the place of the model's, by name. Raises UserError for what
    `refuse_or_note` refuses, for steps beyond float16, and when the disk is full.
    """
    dtype = chosen_dtype(model, dtype)
    modules = dict(model.named_modules())
    grids = {name: solution.grid for name, solution in solutions.items()}
    refuse_or_note(model, grids)
    scheme = scheme_of((grid, *modules[name].weight.shape) for name, grid in grids.items())
    linear, rounding = 0, Rounding()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal linear, rounding
        for name, solution in solutions.items():
            if tuple(solution.codes.shape) != tuple(modules[name].weight.shape):
                raise ValueError(f"{name}: codes {tuple(solution.codes.shape)}, {tuple(modules[name].weight.shape)}")
            site, changed = site_tensors(name, solution, scheme)
            rounding += changed
            for key, tensor in site.items():
                linear += tensor.nbytes
                yield key, tensor
        yield from untouched(model, grids, dtype, replaced)

    head = model.get_output_embeddings()
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    config = quantization_config(scheme, (name for name in linears if name not in grids), grids)
    with atomic_directory(out) as folder:
        write_shards(folder, tensors(), max_shard_bytes)
        write_side_files(folder, model, tokenizer, dtype, config)
        write_json(folder / "quantize_config.json", config)
    return summarize(out, linear, rounding.notes())

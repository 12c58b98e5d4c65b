"""Weights that go back towards the public base, before anything is solved: all alike, aimed, or as a plan says.

RUN/taught.safetensors    what each group of weights taught the model of private, domain and public text
SHARED/taught-KEY.safetensors   the same where runs of one model share it, under a key of all that it depends on
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from geoquant import __version__
from geoquant.data.records import read_records
from geoquant.errors import UserError
from geoquant.forgetting import divided
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded
from geoquant.model.walk import walk
from geoquant.observe.texts import Sequences, padded
from geoquant.plan.chosen import Chosen
from geoquant.privacy.aim import GROUP, TEXTS, goes_back, spread_over, taught
from geoquant.privacy.anchor import anchored
from geoquant.privacy.scoring import encode
from geoquant.progress import Progress
from geoquant.recipe import Recipe
from geoquant.runs import read_tensors, write_tensors

__all__ = ["FEWEST", "anchor_model", "as_planned", "long_enough", "part_of"]

FEWEST = 8  # records on a side


def anchor_model(
    run: Path,
    recipe: Recipe,
    loaded: Loaded,
    base: Loaded,
    public: Tensor,
    shared: Path | None,
    progress: Progress,
) -> dict:
    """Every weight, embeddings, norms and biases too, moved towards the base's in place; with `--aim metric` those that
    are not in layers of blocks, which move while they are solved (combining.py)."""
    theirs = dict(base.model.named_parameters())
    facts = {"lever": "anchor", "aim": recipe.aim, "anchor": recipe.anchor, "base_sha256": model_hash(base.model)}
    choice = None
    if recipe.aim == "memory":
        choice, facts["measuring"] = _taught(run, recipe, loaded, base, public, shared, progress)
    told = {text: [0.0, 0.0] for text in TEXTS}
    layers = set()
    if recipe.aim == "metric":
        layers = {f"{site.name}.weight" for block in walk(loaded.model, public[:1, :8]) for site in block.sites}

    def share_of(name: str, shape: tuple[int, ...]) -> Tensor | float:
        if choice is None:
            return 1 - recipe.anchor
        groups = {text: choice[f"{text}/{name}"] for text in TEXTS}
        back = goes_back(groups, recipe.anchor)
        for text, values in groups.items():
            told[text][0] += values.sum().item()
            told[text][1] += values[back].sum().item()
        return spread_over((~back).float(), shape)

    facts |= _move(loaded, theirs, share_of, progress, but=layers)
    if choice is not None:
        facts["taught"] = {text: {"all": whole, "put_back": part} for text, (whole, part) in told.items()}
    return facts | {"guarantee": None}


def as_planned(loaded: Loaded, base: Loaded, chosen: Chosen, progress: Progress) -> dict:
    """Every parameter at its unit's share of its change from the base, in place."""
    shares, sizes = chosen.shares, {name: own.numel() for name, own in loaded.model.named_parameters()}
    weights = {
        share: sum(size for name, size in sizes.items() if shares[name] == share)
        for share in sorted({*shares.values()})
    }
    facts = {"lever": "plan", "anchor": None, "looked": chosen.looked, "base_sha256": chosen.sha256["base"]}
    facts["weights"] = [[share, count / sum(sizes.values())] for share, count in weights.items()]
    moved = _move(loaded, dict(base.model.named_parameters()), lambda name, _: shares[name], progress)
    return facts | moved | {"guarantee": None}


def _move(
    loaded: Loaded,
    theirs: dict[str, Tensor],
    share_of: Callable[[str, tuple[int, ...]], Tensor | float],
    progress: Progress,
    but: Collection[str] = (),
) -> dict:
    """Every parameter at `share_of(name, shape)` of its change, in place: how long the change was and is, and the share
    of each part of the model that was moved. but: parameters that are left as they are and not counted."""
    before = after = 0.0
    moved: dict[str, list[int]] = {}
    mine = {name: own for name, own in loaded.model.named_parameters() if name not in but}
    for index, (name, own) in enumerate(mine.items()):
        original, its = own.detach(), theirs[name].detach()
        share = share_of(name, tuple(own.shape))
        before += (original.float() - its.float()).square().sum().item()
        own.data = anchored(original, its, share)
        after += (own.detach().float() - its.float()).square().sum().item()
        counts = moved.setdefault(part_of(name), [0, 0])
        counts[0] += int((torch.as_tensor(share) < 1).expand(own.shape).sum())
        counts[1] += own.numel()
        progress("anchor", index + 1, len(mine), name)
    return {
        "distance": {"before": math.sqrt(before), "after": math.sqrt(after)},
        "moved": {part: moved_ / count for part, (moved_, count) in moved.items()},
    }


def part_of(name: str) -> str:
    """A parameter's place in the model, without the number of its block."""
    return name.rpartition(".")[0].rpartition(".")[2] or name


def _taught(
    run: Path,
    recipe: Recipe,
    loaded: Loaded,
    base: Loaded,
    public: Tensor,
    shared: Path | None,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict]:
    """By text and parameter, what the change of each group of weights taught, measured once: per run, or in a shared
    folder per contents. And how long that took (None where nobody wrote it down), and whether it was here.
    """
    filler = 0  # any token does: nothing real sees it
    texts = {"public": padded(public.tolist(), filler)}
    for name in ("private", "domain"):
        records = read_records(getattr(recipe, name))
        if name == "domain" and recipe.forget:
            records, _ = divided(records)  # the others say what strangers are like
        encoded = encode(loaded.tokenizer, records, recipe.window)
        texts[name] = padded(long_enough(name, encoded), filler)
    path = run / "taught.safetensors"
    if shared is not None:
        path = shared / f"taught-{_key(loaded, base, texts)}.safetensors"
    here = not path.exists()
    if here:
        started = time.perf_counter()
        found = taught(loaded.model, dict(base.model.named_parameters()).__getitem__, texts, progress=progress)
        sums = {f"{text}/{name}": values for text, many in found.items() for name, values in many.items()}
        if not path.exists():  # or another process was first, and all go by what that one found
            write_tensors(path, sums, {"seconds": f"{time.perf_counter() - started:.3f}"})
    sums, told = read_tensors(path)
    return sums, {"seconds": float(told["seconds"]) if "seconds" in told else None, "here": here}


def _key(loaded: Loaded, base: Loaded, texts: Mapping[str, Sequences]) -> str:
    """Names everything that the measurement depends on: both models' tensors, and the tokens of every text."""
    cut = {
        name: [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (text.tokens, text.lengths)]
        for name, text in texts.items()
    }
    told = [__version__, GROUP, model_hash(loaded.model), model_hash(base.model), cut]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def long_enough(name: str, encoded: list[tuple[list[int], list]]) -> list[list[int]]:
    """The tokens of records that predict one. Raises UserError where they are too few."""
    found = [ids for ids, _ in encoded if len(ids) > 1]
    if len(found) < FEWEST:
        raise UserError(f"too few {name} records of two tokens or more: {len(found)}", wanted=f"at least {FEWEST}")
    return found

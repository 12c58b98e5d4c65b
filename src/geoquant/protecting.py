"""Before anything is solved: what the compressed model may still know of the data it was fine-tuned on.

A lever on whole weights makes another model of the given one, in RUN/protected; from there on the run compresses that
one. Whatever follows (metric, scales, order, rates) is decided on the protected weights, and a run that goes on reads
them back.

    RUN/released.json         that private weights were released into this run, which must not happen twice
    RUN/protected/            an ordinary model folder: it can be evaluated and audited by itself
        protection.json       which levers made it, and how much they changed
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.anchoring import FEWEST, anchor_model, as_planned, long_enough
from geoquant.combining import check_combining
from geoquant.data.records import Split, known_among, read_records
from geoquant.errors import UserError
from geoquant.export.weights import chosen_dtype, untouched, write_shards, write_side_files
from geoquant.forgetting import HALFWAY, check_forgetting, divided, forget_records, observed, seen
from geoquant.inputs import check_same_weights
from geoquant.lending import lendable, link_folder
from geoquant.measure import BUILTIN, prepare_texts
from geoquant.model.load import Loaded, load
from geoquant.model.paging import trim
from geoquant.plan.chosen import Chosen
from geoquant.planned import check_options, check_planned_base
from geoquant.privacy.guarantee.claim import Inherit
from geoquant.privacy.scoring import encode
from geoquant.progress import Progress
from geoquant.recipe import Recipe
from geoquant.releasing import check_claim, claimed, entry_of, foretold, public_base, release_model
from geoquant.runs import atomic_directory, read_json, write_json

__all__ = [
    "check_base",
    "check_protection",
    "load_protected",
    "protect",
    "protected",
    "protected_folder",
    "protected_there",
    "released",
]

FOLDER, FACTS = "protected", "protection.json"
RELEASED = "released.json"  # there from the moment at which released weights are, whatever else is lost
PUBLIC = 4  # windows of the calibration text that speak for public text


def protected(recipe: Recipe, chosen: Chosen | None = None) -> bool:
    """Whether a lever on whole weights is asked for. chosen: the plan that the recipe names."""
    return recipe.anchor > 0 or recipe.forget > 0 or released(recipe) or (chosen is not None and chosen.anchors)


def protected_there(run: Path) -> bool:
    """Whether such a lever made the model that this run compresses."""
    return (run / FOLDER / FACTS).exists()


def released(recipe: Recipe) -> bool:
    """Whether the weights pass through a mechanism, after which the given model must not be looked at again."""
    claim = claimed(recipe)
    return claim is not None and not isinstance(claim, Inherit)


def protected_folder(run: Path) -> str:
    """Where the model lies that is compressed in the given one's place. Raises UserError where it is gone."""
    folder = (run / FOLDER).absolute()  # or a missing one would be looked for in the hub
    if not _there(folder):
        again = "restore it: released weights cannot be made again"
        raise UserError(
            f"{folder}, the model that this run compresses, is gone or lacks its weights",
            fix=again if (run / RELEASED).exists() else "run quantize again with --resume",
        )
    return str(folder)


def check_protection(recipe: Recipe, split: Split | None = None, chosen: Chosen | None = None) -> tuple[str, ...]:
    """Raise UserError where levers lack what they need, or what nobody asked for is given; before a model is read.

    split: the records of the audit. chosen: the plan that the recipe names. Returns what the report should warn of.
    """
    if recipe.anchor and recipe.base is None:
        raise UserError(
            f"--anchor {recipe.anchor:g} goes back towards a public base",
            wanted="--base MODEL, the one it was fine-tuned from",
        )
    check_forgetting(recipe)
    if check_claim(recipe) is not None:
        return ()
    if chosen is not None:
        return check_options(recipe, chosen, split)
    # An aim at memory is the default where there are records, whatever these are for.
    if recipe.aim != "everything" and not (
        recipe.anchor or (recipe.aim == "memory" and recipe.private and recipe.domain)
    ):
        said = f"--aim {recipe.aim} says which weights --anchor moves"
        raise UserError(said, got="no --anchor", fix="add --anchor 0.5")
    check_combining(recipe)
    if recipe.refine and recipe.base and not (recipe.anchor or recipe.private or recipe.domain):
        fix = "leave it out, or for the audit: --reference"
        raise UserError("--base serves --anchor, and --refine with --private and --domain", got="neither", fix=fix)
    if recipe.refine and not recipe.forget and (not protected(recipe) or recipe.aim == "everything"):
        return ()  # what refinement needs of these, refining.py says
    if not protected(recipe):
        for name in ("base", "private", "domain"):
            if getattr(recipe, name) is not None:
                fix = "add --anchor 0.5 or --forget 4" + (", or for the audit: --reference" if name == "base" else "")
                raise UserError(f"--{name} serves --anchor and --forget", got="neither", fix=fix)
        return ()
    if recipe.aim == "everything" and not recipe.forget:
        for name in ("private", "domain"):
            if getattr(recipe, name) is not None:
                raise UserError(f"--{name} serves --aim memory", got="--aim everything", fix=f"leave out --{name}")
        return ()
    aim = f"--aim {'memory' if recipe.aim == 'everything' else recipe.aim}"
    if missing := [name for name in ("private", "domain") if getattr(recipe, name) is None]:
        raise UserError(
            f"{aim} compares what was trained on with what was not; --{missing[0]} is missing",
            wanted="--private FILE and --domain FILE",
            fix="give both, or --aim everything to move every weight alike",
        )
    private, domain = (read_records(getattr(recipe, name)) for name in ("private", "domain"))
    for name, records in (("private", private), ("domain", domain)):
        if len(records) < FEWEST:
            raise UserError(f"too few records in --{name}: {len(records)}", wanted=f"at least {FEWEST}")
    if known := known_among(private, domain):
        raise UserError(
            f"{known} of {len(private)} records of --private, which the model was trained on, are in --domain, whose "
            "records it is not to have seen",
            fix="remove them from one of the files",
        )
    if split is None:
        return ()
    members, strangers = (*split.members, *split.canaries), (*split.nonmembers, *split.withheld)
    if known := known_among(domain, members, strangers):
        raise UserError(
            f"{known} records of --domain are audited too: the levers learn from them",
            wanted="records that are in neither --members nor --nonmembers",
        )
    if known := known_among(private, strangers):
        raise UserError(
            f"{known} records of --private, which the model was trained on, are in --nonmembers, which it never saw",
            fix="remove them from one of the files",
        )
    if known := known_among(members, private):
        return (
            f"the levers looked at {known} of the {len(members)} audited members and canaries: the audit says how well "
            "these are protected, not how well others are",
        )
    return ()


def protect(
    run: Path,
    recipe: Recipe,
    loaded: Loaded,
    public: Int[Tensor, "n length"],
    progress: Progress,
    chosen: Chosen | None = None,
    *,
    shared: Path | None = None,
) -> dict:
    """Make RUN/protected of the given model, if it is not there; what the report says of the levers. public: windows of
    public text. chosen: the plan that the recipe names. shared: a folder where runs find what others measured of the
    same weights and texts, and leave it.

    The model is changed in place, so that memory never holds it twice: the caller gives it up and goes on with
    `load_protected`.
    """
    folder, common, started = run / FOLDER, None, time.perf_counter()
    if not _there(folder):
        if released(recipe):
            made, facts = _release(run, recipe, loaded, progress)
        else:
            base, made = load(recipe.base, device=recipe.device), loaded
            check_same_weights(loaded, base)
            if (common := lendable(shared, recipe, loaded, base, public)) and _there(common):
                return _borrow(common, folder)
            facts, original = {}, observed(recipe, loaded, public, progress) if recipe.forget else None
            if chosen is not None:
                facts = as_planned(loaded, base, chosen, progress)
            elif recipe.anchor:
                facts = anchor_model(run, recipe, loaded, base, public[:PUBLIC], shared, progress)
            if recipe.forget:
                facts = forget_records(run, recipe, loaded, base, original, facts, progress)
                facts["making"] = {"seconds": time.perf_counter() - started, "here": True}
        dtype = chosen_dtype(made.model, None)
        if released(recipe):
            write_json(run / RELEASED, {"mechanism": facts["guarantee"]["mechanism"]})
        with atomic_directory(folder) as partial:
            write_shards(partial, untouched(made.model, (), dtype))
            write_side_files(partial, made.model, made.tokenizer, dtype)
            write_json(partial / FACTS, facts)
        (run / HALFWAY).unlink(missing_ok=True)
        if common is not None and not _there(common):  # or another process was first
            link_folder(folder, common)
    return read_json(folder / FACTS, lever=str)


def _borrow(common: Path, folder: Path) -> dict:
    """RUN/protected as another run made it."""
    link_folder(common, folder)
    facts = read_json(folder / FACTS, lever=str, making=dict)
    # That run may have found a part of it finished.
    found = facts.pop("measuring", None) or {"here": True}
    facts["making"]["seconds"] += 0.0 if found["here"] else found["seconds"] or 0.0
    facts["making"]["here"] = False
    write_json(folder / FACTS, facts)
    return facts


def _release(run: Path, recipe: Recipe, loaded: Loaded, progress: Progress) -> tuple[Loaded, dict]:
    """The public base with every tensor released, and what the report says of it."""
    if (run / RELEASED).exists() or any((run / "sites").glob("*.safetensors")):
        raise UserError(
            f"the released weights of {run} are gone, and drawing noise again would be a second release",
            fix="restore RUN/protected, or choose a new folder",
        )
    claim = claimed(recipe)
    base = public_base(claim, recipe, loaded)
    text, tokens = recipe.calibration or BUILTIN, None
    if recipe.ball == "metric":
        tokens = prepare_texts(base.tokenizer, recipe).calibration.tokens
    price = foretold(claim, base, recipe.rate if recipe.grid == "lattice" else recipe.bits)
    guarantee = release_model(claim, base, loaded.model, tokens=tokens, text=text, progress=progress)
    entry = entry_of(guarantee, claim, recipe.base or recipe.model, text, price)
    return base, {"lever": "guarantee", "anchor": None, "distance": None, "guarantee": entry}


def load_protected(run: Path, device: str) -> Loaded:
    """The model that `protect` made."""
    folder = protected_folder(run)
    gc.collect()
    trim()
    return load(folder, device=device)


def _there(folder: Path) -> bool:
    return (folder / FACTS).exists() and any(folder.glob("model*.safetensors"))


def check_base(recipe: Recipe, loaded: Loaded, chosen: Chosen | None = None) -> None:
    """Raise UserError where an anchor cannot go back to the base that was given; before anything is measured."""
    if not protected(recipe, chosen) or released(recipe):
        return
    base = load(recipe.base, device=recipe.device)
    check_same_weights(loaded, base)
    if chosen is not None:
        check_planned_base(chosen, loaded, base)
        return
    theirs = dict(base.model.named_parameters())
    moved = (not torch.equal(own.detach(), theirs[name].to(own.dtype)) for name, own in loaded.model.named_parameters())
    if not any(moved):
        raise UserError(
            f"the base {base.name} has the very weights of {loaded.name}: there is nothing to go back from",
            fix="give the model that it was fine-tuned from",
        )
    if recipe.forget:
        seen(recipe, loaded, torch.zeros(1, 8, dtype=torch.int64))
    if recipe.anchor and recipe.aim != "everything":
        for name in ("private", "domain"):
            records = read_records(getattr(recipe, name))
            if name == "domain" and recipe.forget:
                records, _ = divided(records)
            long_enough(name, encode(loaded.tokenizer, records, recipe.window))

"""After solving: codes move by at most one step, so that the model keeps its function and knows less of its records.

    RUN/refined/              one file per stage as in RUN/sites, with the refined codes; complete or not there
        refinement.json       what was done
    RUN/refine_material.safetensors, RUN/refine_state.safetensors       while it is under way

What is measured, audited and exported afterwards reads the refined codes (see results.py). The model that was solved is
what refinement keeps to: the protected one, if levers on whole weights were used. No formal guarantee follows.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from geoquant.data.records import Split, known_among, read_records
from geoquant.errors import UserError
from geoquant.measure import Texts
from geoquant.model.load import Loaded, load
from geoquant.model.paging import map_weights
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.compute import compute_dtype
from geoquant.observe.stream import spread
from geoquant.privacy.refine import (
    Material,
    RefineSettings,
    State,
    context_of,
    observe_base,
    observe_original,
    refine,
    texts_of,
)
from geoquant.progress import Progress
from geoquant.protecting import load_protected, protected_there
from geoquant.recipe import Recipe
from geoquant.releasing import claimed
from geoquant.results import REFINED, StageFiles, refined_bits, save_refined
from geoquant.runs import atomic_directory, file_hash, read_json, read_tensors, write_json, write_tensors

__all__ = ["check_refinement", "look_before", "material_of", "refine_run", "refinement_pending"]

FACTS, MATERIAL, STATE = "refinement.json", "refine_material.safetensors", "refine_state.safetensors"
WINDOWS = 8  # of the calibration text


def check_refinement(recipe: Recipe, split: Split | None) -> None:
    """Raise UserError where refinement lacks records or a base, or would look at what the audit judges by, and for its
    options without it."""
    given = {name: getattr(recipe, name) for name in ("private", "domain")}
    weighed = recipe.refine_privacy != Recipe.model_fields["refine_privacy"].default
    if weighed and not (recipe.refine and any(given.values())):
        raise UserError(
            f"--refine-privacy {recipe.refine_privacy:g} weighs private records against function in refinement",
            got="no --private and --domain" if recipe.refine else "no --refine",
            fix="leave --refine-privacy out, or add "
            + ("both" if recipe.refine else "--refine N, with --private and --domain"),
        )
    if not recipe.refine:
        return
    if len(there := [name for name, path in given.items() if path]) == 1:
        raise UserError(
            "refinement pulls private records to the level of others of their kind",
            got=f"--{there[0]} alone",
            wanted="both --private and --domain, or neither",
        )
    if not there:
        return
    if claimed(recipe) is not None:
        raise UserError(
            "refinement on private records is no part of any guarantee, and would end it",
            got="--refine with --private beside a guarantee",
            fix="leave out --refine, or give up the guarantee",
        )
    if recipe.base is None:
        raise UserError(
            "how well a model should know a record is judged beside a public base",
            wanted="--base MODEL, the one it was fine-tuned from",
        )
    if split is not None:
        audited = split.members, split.nonmembers, split.canaries, split.withheld
        for name, path in given.items():
            if shared := known_among(read_records(path), *audited):
                raise UserError(
                    f"{shared} records of --{name} are among those of the audit",
                    wanted="an audit on records that no lever has seen",
                    fix="divide the records between --private/--domain and --members/--nonmembers",
                )


def refinement_pending(run: Path, recipe: Recipe) -> bool:
    """Whether refinement is asked for and not done."""
    return bool(recipe.refine) and not (run / REFINED / FACTS).exists()


def material_of(recipe: Recipe, loaded: Loaded, texts: Texts) -> Material:
    """The texts that refinement looks at: some windows of the calibration text, and the records. Raises UserError where
    records are too few."""
    windows = texts.calibration
    chosen = spread(len(windows), min(1.0, WINDOWS / len(windows)))
    records = [read_records(path) if path else () for path in (recipe.domain, recipe.private)]
    windows = replace(windows, tokens=windows.tokens[chosen])
    return texts_of(loaded.tokenizer, windows, *records, limit=context_of(loaded.model))


def look_before(run: Path, recipe: Recipe, loaded: Loaded, material: Material) -> Material:
    """What the original says of the texts and the base of the records, before anything is solved; kept for a run that
    goes on."""
    path = run / MATERIAL
    if not path.exists():
        material = observe_original(loaded.model, material)
        if recipe.private:
            material = observe_base(load(recipe.base, device=recipe.device).model, material)
        known = {f"{kind} {name}": x for kind in ("states", "base") for name, x in getattr(material, kind).items()}
        write_tensors(path, known)
    tensors, _ = read_tensors(path)
    kinds: dict[str, dict[str, Tensor]] = {"states": {}, "base": {}}
    for name, tensor in tensors.items():
        kind, _, text = name.partition(" ")
        kinds[kind][text] = tensor
    return replace(material, **kinds)


def refine_run(
    run: Path, recipe: Recipe, loaded: Loaded, blocks: tuple[Block, ...], material: Material, progress: Progress
) -> dict:
    """Refine what RUN/sites holds, in the model too, if RUN/refined is not there; what the report says of it."""
    if not refinement_pending(run, recipe):
        return read_json(run / REFINED / FACTS, losses=dict)
    started = time.process_time()
    original = load_protected(run, recipe.device) if protected_there(run) else load(recipe.model, device=recipe.device)
    pages = map_weights(original.model)

    def wanted(stage: Stage) -> Tensor:
        modules = [original.model.get_submodule(site.name) for site in stage.sites]
        weight = torch.cat([read_weight(module) for module in modules])
        pages.release(module.weight for module in modules)
        return weight

    settings = RefineSettings(passes=recipe.refine, privacy=recipe.refine_privacy)
    start = StageFiles(run, blocks)
    found = refine(
        loaded.model,
        blocks,
        start,
        material,
        settings,
        wanted=wanted,
        head=original.model.get_output_embeddings().weight.detach(),
        state=State(run / STATE, _key(recipe, run, blocks)),
        compute=compute_dtype(recipe.compute, loaded.model.device),
        progress=progress,
    )
    stages = [stage for block in blocks for stage in block.stages]
    with atomic_directory(run / REFINED) as partial:
        for stage in stages:
            save_refined(partial, run, stage, found[stage.name], found.share_moved(stage.name))
        weights = {stage.name: stage.rows * stage.columns for stage in stages}
        bits = [refined_bits(folder, stages) for folder in (run / "sites", partial)]
        facts = {
            "passes": settings.passes,
            "kept_pass": found.best,
            "privacy_weight": settings.privacy,
            "sequences": {name: len(text.tokens) for name, text in material.texts.items()},
            "losses": {"before": found.history[0].to_dict(), "after": found.history[found.best].to_dict()},
            "totals": [losses.total for losses in found.history],
            "moved": sum(found.share_moved(name) * size for name, size in weights.items()) / sum(weights.values()),
            "bits_per_weight": {"before": bits[0], "after": bits[1]},
            "seconds": time.process_time() - started,
            "guarantee": None,
        }
        write_json(partial / FACTS, facts)
    for name in (STATE, MATERIAL):
        (run / name).unlink(missing_ok=True)
    return facts


def _key(recipe: Recipe, run: Path, blocks: tuple[Block, ...]) -> str:
    """Names what a half-finished refinement belongs to: settings, and the codes that it started from."""
    files = [run / "sites" / f"{stage.name}.safetensors" for block in blocks for stage in block.stages]
    known = [recipe.refine, recipe.refine_privacy, [[path.name, file_hash(path)] for path in files]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

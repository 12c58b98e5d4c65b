"""After solving: codes move by at most one step, so that the model keeps its function and knows less of its records.

    RUN/refined/              one file per stage as in RUN/sites, with the refined codes; complete or not there
        refinement.json       what was done
    RUN/refine_material.safetensors, RUN/refine_state.safetensors, RUN/refine_blocks/, RUN/refine_geometry/
                              while it is under way

What is measured, audited and exported afterwards reads the refined codes (see results.py). The model that was solved is
what refinement keeps to: the protected one, if levers on whole weights were used. No formal guarantee follows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from geoquant.data.records import Split, known_among, read_records
from geoquant.errors import UserError
from geoquant.measure import Texts
from geoquant.model.load import Loaded, load
from geoquant.model.paging import map_weights
from geoquant.model.vocabulary import repeated
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.compute import compute_dtype
from geoquant.observe.stream import spread
from geoquant.privacy.refine import (
    BlockError,
    BlockState,
    Bounds,
    Cloud,
    Geometry,
    Material,
    Refined,
    RefineSettings,
    State,
    begin_geometry,
    context_of,
    observe_base,
    observe_clouds,
    observe_original,
    refine,
    refine_blocks,
    texts_of,
)
from geoquant.progress import Progress
from geoquant.protecting import load_protected, protected_there
from geoquant.recipe import Recipe
from geoquant.releasing import claimed
from geoquant.results import REFINED, StageFiles, refined_bits, save_refined
from geoquant.runs import atomic_directory, file_hash, read_json, read_tensors, write_json, write_tensors
from geoquant.solve import restore

__all__ = ["check_refinement", "look_before", "material_of", "refine_run", "refinement_pending"]

FACTS, MATERIAL, STATE = "refinement.json", "refine_material.safetensors", "refine_state.safetensors"
BLOCKS, CLOUDS = "refine_blocks", "refine_geometry"  # folders
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
    _refuse_idle(recipe)
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


def _refuse_idle(recipe: Recipe) -> None:
    """Raise UserError for an option of refinement that nothing would read."""
    if not recipe.refine:
        for name, does in (
            ("refine_blocks", "refines block by block before the passes of --refine"),
            ("refine_geometry", "weighs the distortion of rows in refinement"),
        ):
            if value := getattr(recipe, name):
                flag = f"--{name.replace('_', '-')}"
                fix = f"leave {flag} out, or add --refine N"
                raise UserError(f"{flag} {value:g} {does}", got="no --refine", fix=fix)
    if not (recipe.refine and recipe.refine_geometry):
        for name in ("refine_threshold", "refine_lowered"):
            if (value := getattr(recipe, name)) != Recipe.model_fields[name].default:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {value:g} says which rows pay under --refine-geometry",
                    got="no --refine-geometry",
                    fix=f"leave {flag} out, or add --refine-geometry 100, with --refine N",
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


def look_before(run: Path, recipe: Recipe, loaded: Loaded, blocks: tuple[Block, ...], material: Material) -> Material:
    """What the original says of the texts and the base of the records, before anything is solved; kept for a run that
    goes on. So is what its rows are like, if their distortion counts."""
    path, compute = run / MATERIAL, compute_dtype(recipe.compute, loaded.model.device)
    if recipe.refine_geometry and not (run / CLOUDS).exists():
        with atomic_directory(run / CLOUDS) as partial:
            for stage, cloud in observe_clouds(loaded.model, repeated(blocks), material.texts["public"], compute):
                write_tensors(partial / f"{stage}.safetensors", vars(cloud))
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
        _clear(run)  # a run may have been killed before it came to that
        return read_json(run / REFINED / FACTS, losses=dict)
    started = time.process_time()
    original = load_protected(run, recipe.device) if protected_there(run) else load(recipe.model, device=recipe.device)
    pages = map_weights(original.model)

    def wanted(stage: Stage) -> Tensor:
        modules = [original.model.get_submodule(site.name) for site in stage.sites]
        weight = torch.cat([read_weight(module) for module in modules])
        pages.release(module.weight for module in modules)
        return weight

    settings = RefineSettings(passes=recipe.refine, privacy=recipe.refine_privacy, geometry=recipe.refine_geometry)
    start, key = StageFiles(run, blocks), _key(recipe, run, blocks)
    compute = compute_dtype(recipe.compute, loaded.model.device)
    geometry = first = None
    if recipe.refine_geometry:
        bounds = Bounds(threshold=recipe.refine_threshold, lowered=recipe.refine_lowered)
        geometry = begin_geometry(loaded.model, blocks, _Clouds(run / CLOUDS, loaded.model.device), wanted, bounds)
        before = geometry.account(loaded.model)
    if recipe.refine_blocks:
        first, errors = refine_blocks(
            loaded.model,
            original.model,
            blocks,
            start,
            material.texts,
            recipe.refine_blocks,
            wanted=wanted,
            state=BlockState(run / BLOCKS, key),
            compute=compute,
            pages=pages,
            progress=progress,
        )
        # What is offered is compared with the solver's codes.
        restore(loaded.model, repeated(blocks), lambda stage: start[stage.name])
    found = refine(
        loaded.model,
        blocks,
        start,
        material,
        settings,
        wanted=wanted,
        head=original.model.get_output_embeddings().weight.detach(),
        state=State(run / STATE, key),
        first=first,
        geometry=geometry,
        compute=compute,
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
            "blocks": None if first is None else _blocks_entry(recipe, found, errors),
            "geometry": None if geometry is None else _geometry_entry(recipe, geometry, loaded, before),
            "sequences": {name: len(text.tokens) for name, text in material.texts.items()},
            "losses": {
                "before": (found.tried or found.history)[0].to_dict(),
                "after": found.history[found.best].to_dict(),
            },
            "totals": [losses.total for losses in found.history],
            "moved": sum(found.share_moved(name) * size for name, size in weights.items()) / sum(weights.values()),
            "bits_per_weight": {"before": bits[0], "after": bits[1]},
            "seconds": time.process_time() - started,
            "guarantee": None,
        }
        write_json(partial / FACTS, facts)
    _clear(run)
    return facts


def _clear(run: Path) -> None:
    """Remove what is there only while refinement is under way: some of it was measured on private records."""
    for name in (STATE, MATERIAL):
        (run / name).unlink(missing_ok=True)
    for name in (BLOCKS, CLOUDS):
        shutil.rmtree(run / name, ignore_errors=True)


def _key(recipe: Recipe, run: Path, blocks: tuple[Block, ...]) -> str:
    """Names what a half-finished refinement belongs to: settings, and the codes that it started from."""
    files = [run / "sites" / f"{stage.name}.safetensors" for block in blocks for stage in block.stages]
    options = [value for name, value in recipe.model_dump().items() if name.startswith("refine")]
    known = [options, [[path.name, file_hash(path)] for path in files]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


class _Clouds(Mapping):
    """The clouds in a folder by stage, read as they are asked for."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device

    def __getitem__(self, stage: str) -> Cloud:
        tensors, _ = read_tensors(self.folder / f"{stage}.safetensors")
        return Cloud(**{name: tensor.to(self.device) for name, tensor in tensors.items()})

    def __iter__(self) -> Iterator[str]:
        return (path.name.removesuffix(".safetensors") for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, stage: object) -> bool:
        return (self.folder / f"{stage}.safetensors").exists()


def _blocks_entry(recipe: Recipe, found: Refined, errors: tuple[tuple[BlockError, BlockError], ...]) -> dict:
    """What the pass block by block did, and whether the passes end to end started from there."""
    before, after = found.tried
    return {
        "passes": recipe.refine_blocks,
        "errors": [{"before": one.to_dict(), "after": other.to_dict()} for one, other in errors],
        "losses": {"before": before.to_dict(), "after": after.to_dict()},
        "kept": after.total < before.total,
    }


def _geometry_entry(recipe: Recipe, geometry: Geometry, loaded: Loaded, before: dict) -> dict:
    """The distortion of rows by class, at the solver's codes and at those that were kept."""
    return {
        "weight": recipe.refine_geometry,
        "threshold": recipe.refine_threshold,
        "lowered": recipe.refine_lowered,
        "classes": {"before": before, "after": geometry.account(loaded.model)},
    }

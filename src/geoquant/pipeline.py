"""The product on one page: load, protect, observe, plan, solve, refine, audit, export, report."""

from __future__ import annotations

import gc
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoquant import combining, reporting
from geoquant.auditing import attack, load_records
from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.examine import check_context
from geoquant.export import check
from geoquant.export.verify import write_expected
from geoquant.exporting import raise_failure, verified, write_export
from geoquant.finished import earlier_exports, finished_report
from geoquant.manifest import check_same_model, check_same_recipe, finish_manifest, write_manifest
from geoquant.measure import (
    OF_THE_ORIGINAL,
    Texts,
    doubts,
    measure_original,
    measure_quantized,
    prepare_texts,
    score_model,
    score_reference,
    take_over,
)
from geoquant.model.folding import Fold, find_folds
from geoquant.model.load import Loaded, load, load_tokenizer
from geoquant.model.paging import map_weights
from geoquant.model.vocabulary import ends, repeated, vocabulary
from geoquant.model.walk import Block, Stage, untouched_parameters, walk
from geoquant.observe.compute import compute_dtype
from geoquant.observe.gradient import check_head
from geoquant.observe.stream import Stream, open_stream, spread
from geoquant.plan.chosen import Chosen
from geoquant.plan.estimate import Cost, cost
from geoquant.plan.stage_rates import StageRates
from geoquant.plan.uniform import Plan, check_choices, uniform_plan
from geoquant.planned import check_planned, missed, plan_entry, planned, with_rates
from geoquant.privacy.scores import SplitScores
from geoquant.privacy.scoring import check_same_tokens
from geoquant.privacy.validity import check_sides
from geoquant.progress import Progress, silent
from geoquant.protecting import (
    check_base,
    check_protection,
    load_protected,
    protect,
    protected,
    protected_folder,
    released,
)
from geoquant.recipe import PACKED, Recipe, checked, located
from geoquant.refining import check_refinement, look_before, material_of, refine_run, refinement_pending
from geoquant.releasing import announced, chosen_by, with_guarantee
from geoquant.report.build import write_report
from geoquant.results import REFINED, load_stage, save_stage, stage_path
from geoquant.runs import claim_output, read_json, recorded_recipe, remove_empty, write_json
from geoquant.solve import install, restore, solve_model, solve_vocabulary
from geoquant.steps import look_back, rows_of, settled, step_of

__all__ = ["export", "make_plan", "prepare", "quantize"]


def quantize(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    known: Path | None = None,
    shared: Path | None = None,
    goal: dict | None = None,
    progress: Progress = silent,
    command: str = "",
) -> dict:
    """Compress `recipe.model` into the run folder `out`; returns the report.

    known: a folder with what was measured of the same original on the same texts and records (measure.take_over).
    shared: a folder for what levers measure of a model and its texts, where several runs may need the same.
    goal: why these options were chosen (aiming.aimed), for the report.

    Raises UserError for whatever the user can mend, before any work where that is possible. A run that was
    stopped at any point continues with `resume=True` to the same bits; one that lacks nothing is not touched.
    """
    run, clock, recipe = Path(out), reporting.Clock(), located(recipe)
    made = claim_output(run, resume=resume)
    manifest, base_scores, base = run / "manifest.json", run / "base_scores.safetensors", None
    new = not manifest.exists()
    if not new:
        check_same_recipe(run, recipe)
        if (report := finished_report(run, recipe)) is not None:
            return report
    reporting.forget_peak_memory()
    try:
        with clock("load"):
            split, chosen = load_records(recipe), planned(recipe)
            check_refinement(recipe, split)
            looked = check_protection(recipe, split, chosen)
            # Before hours of work: whether the records will allow a verdict.
            check = check_sides(split, seed=recipe.seed) if split else None
            if check and check.refusal:
                progress("records", 0, 1, "they allow no verdict on leakage")
            loaded, blocks, texts, plan, notes = prepare(recipe, chosen=chosen)
            material = material_of(recipe, loaded, texts) if recipe.refine else None
            check_base(recipe, loaded, chosen)
            price, guarantee = announced(recipe, loaded, texts)
            if price:
                progress("guarantee", 0, 1, price)
                notes += (price,)
            for warning in (changed := write_manifest(run, recipe, loaded, texts, split, command)):
                progress("resume", 0, 1, warning)
            notes += looked + changed
            take_over(known, run)
            if split and recipe.reference:
                if not base_scores.exists():
                    names = recipe.model, loaded.tokenizer, recipe.reference, load_tokenizer(recipe.reference)
                    check_same_tokens(*names, split)
                    loaded = None  # never two models in memory: this one is read again below
                base = score_reference(base_scores, recipe.reference, split, recipe.device, progress)
                loaded = loaded or load(recipe.model, device=recipe.device)
    except Exception:
        if new:  # nothing worth resuming: leave no trace
            for name in ("manifest.json", *OF_THE_ORIGINAL):
                (run / name).unlink(missing_ok=True)
        remove_empty(made)
        raise
    write_json(run / "plan.json", plan.to_dict())
    if goal is not None:
        write_json(run / "goal.json", goal)

    with clock("measure the original"):
        before = measure_original(run, loaded.model, texts.evaluation, progress)
        notes += doubts(before, loaded.model.config.get_text_config().vocab_size)
        original = score(run, "original", loaded, split, progress)
    stages = [stage for block in blocks for stage in block.stages]
    missing = [stage for stage in stages if not stage_path(run, stage).exists()]
    solver, exported = None, earlier_exports(run)
    if missing:  # whatever was made of the sites before is made again
        shutil.rmtree(run / REFINED, ignore_errors=True)
    if missing or refinement_pending(run, recipe):
        exported = dict.fromkeys(exported)
        for name in ("quantized.json", "quantized_scores.safetensors"):
            (run / name).unlink(missing_ok=True)
    facts = reporting.model_facts(loaded)
    # A view of the weights file, not a copy: the original's logits are made of it once more.
    moves = protected(recipe, chosen)
    changed = ends(blocks) or moves
    head = loaded.model.get_output_embeddings().weight.detach() if changed else None
    protection = None
    if moves:
        with clock("protect"):
            public = texts.calibration.tokens
            protection = protect(run, recipe, loaded, public, progress, chosen, shared=shared)
            loaded = None  # never two models in memory
            if released(recipe):  # nothing that was decided on the private model outlives it
                loaded, blocks, texts, plan, _ = prepare(recipe, protected_folder(run))
            else:
                loaded = load_protected(run, recipe.device)
    if refinement_pending(run, recipe):
        with clock("refine"):
            material = look_before(run, recipe, loaded, blocks, material)
    with clock("quantize"):
        solve(run, recipe, loaded, blocks, texts, plan, progress)
    if missing == stages:  # a resumed run did only part of the work in this time
        spent = cost(loaded, blocks, texts.calibration.tokens.shape, recipe)
        solver = spent.achieved(clock.seconds["quantize"])
    refinement = None
    if recipe.refine:
        with clock("refine"):
            refinement = refine_run(run, recipe, loaded, blocks, material, progress)
    with clock("measure the quantized model"):
        after = measure_quantized(run, loaded.model, texts.evaluation, progress, head)
        del head
        quantized = score(run, "quantized", loaded, split, progress)
        subjects = {"base": base, "original": original, "quantized": quantized}
        privacy = attack(split, subjects, recipe.seed, check) if split else None
    with clock("export"):
        write_expected(run / "expected.safetensors", loaded.model, texts.evaluation.tokens)
        formats = dict.fromkeys((*recipe.formats, *exported))
        exports = [exported.get(name) or write_export(run, name, loaded, blocks) for name in formats]
    # The readers below load the exported files: this process must not hold a second copy meanwhile.
    del loaded
    gc.collect()
    if recipe.verify:
        with clock("verify"):
            exports = [entry if entry["verified"] else verified(run, entry, progress) for entry in exports]
    report = reporting.assemble(
        run, recipe, facts, blocks, plan, texts, split, before, after, privacy, exports, notes, solver, clock, command
    )
    report["plan"] = None
    if chosen is not None:
        report["plan"] = plan_entry(chosen, report["hashes"]["plan"], blocks, report["sites"])
        report["warnings"] += missed(report["plan"]["stages"])
    report["protection"] = combining.accounted(protection, report["sites"])
    report["refinement"] = refinement
    entry = protection["guarantee"] if protection else guarantee
    report["privacy"] = with_guarantee(privacy, chosen_by(entry, goal))
    report["goal"] = read_json(run / "goal.json") if (run / "goal.json").exists() else None
    write_report(run, report)
    raise_failure(exports)
    finish_manifest(run)
    return report


def prepare(
    recipe: Recipe, model: str | None = None, *, chosen: Chosen | None = None
) -> tuple[Loaded, tuple[Block, ...], Texts, Plan, tuple[str, ...]]:
    """Everything that is decided, and everything that can be refused, before the first long step.

    model: of which; left out, the recipe's. chosen: the plan that the recipe names.
    """
    check_choices(recipe)
    loaded = load(model or recipe.model, device=recipe.device)
    if chosen is not None:
        check_planned(chosen, loaded)
    texts = prepare_texts(loaded.tokenizer, recipe)
    check_context(loaded, recipe.window)
    pages = map_weights(loaded.model)
    blocks = walk(loaded.model, texts.calibration.tokens[:1, :8], pages)
    alone = left_alone(loaded, blocks)
    if recipe.grid == "lattice" and recipe.embeddings:
        if (found := vocabulary(loaded.model, len(blocks))) is not None:
            blocks += (found,)
        else:
            alone += ("embeddings or head are of an unusual kind and stay at full precision",)
    plan = uniform_plan(blocks, recipe)
    if chosen is not None:
        plan = with_rates(plan, blocks, chosen)
    if recipe.metric == "gradient":
        check_head(loaded.model, texts.calibration.tokens[:1, :8], pages)
    streamed = {site.name for block in repeated(blocks) for site in block.sites}
    grids = {site.name: site.grid for site in plan.sites if site.name in streamed}
    choices = {"keep": recipe.keep, "foldable": recipe.foldable, "verify": recipe.verify, "tokenizer": loaded.tokenizer}
    notes = tuple(note for name in recipe.formats for note in check(name, loaded.model, grids, **choices))
    if recipe.grid == "lattice" and (packed := [name for name in recipe.formats if name in PACKED]):
        folds = find_folds(loaded.model, repeated(blocks), texts.calibration.tokens[:1, :8], pages)
        check_folds(packed[0], folds, blocks)
    return loaded, blocks, texts, plan, notes + alone


def check_folds(format: str, folds: dict[str, Fold], blocks: tuple[Block, ...]) -> None:
    """Refuse a format of fixed width where column steps have no place to go."""
    for stage in (stage for block in repeated(blocks) for stage in block.stages):
        if stage.name not in folds:
            raise UserError(
                f"format {format} needs column steps that fold away; no layer before {stage.name} takes them",
                fix="use the formats geoquant, int4 or dense",
            )


def left_alone(loaded: Loaded, blocks: tuple[Block, ...]) -> tuple[str, ...]:
    """A warning where blocks hold matrices that are no sites (fused experts, routers)."""
    rest = untouched_parameters(loaded.model, blocks)
    if not rest:
        return ()
    share = sum(count for _, count in rest) / loaded.parameters
    return (
        f"{len(rest)} matrices inside the blocks stay at full precision, {share:.0%} of the model (e.g. {rest[0][0]})",
    )


def score(run: Path, subject: str, loaded: Loaded, split: Split | None, progress: Progress) -> SplitScores | None:
    """What the audit needs of the model as it is now in memory."""
    if split is None:
        return None
    path = run / f"{subject}_scores.safetensors"
    return score_model(path, loaded.model, loaded.tokenizer, split, progress, f"scores ({subject})")


def solve(
    run: Path, recipe: Recipe, loaded: Loaded, blocks: tuple[Block, ...], texts: Texts, plan: Plan, progress: Progress
) -> None:
    """Observe and solve block by block, in place; each stage's result is on disk before the next one starts."""
    model, tokens = loaded.model, texts.calibration.tokens
    compute = compute_dtype(recipe.compute, model.device)
    pages = map_weights(model)
    stream = open_stream(model, tokens, compute, pages)
    curvature = control = None
    if recipe.metric == "gradient":
        curvature, control = look_back(
            run, recipe, model, blocks, stream, tokens, plan, compute=compute, pages=pages, progress=progress
        )
    plans = {site.name: site for site in plan.sites}
    folds: dict[str, Fold] = {}
    if recipe.grid == "lattice" and recipe.foldable:
        folds = find_folds(model, repeated(blocks), tokens[:1, :8], pages)

    def settings(stage: Stage) -> tuple[str, dict]:
        method, options = plan.settings(stage, static_scales=recipe.static_scales)
        if control is not None:
            options["step"] = step_of(control, run, blocks, stage)
            if stage.name in curvature.rows:
                options["rows"] = rows_of(stage, curvature.rows[stage.name])
            if (fold := folds.get(stage.name)) is not None and fold.shared:
                options["ties"] = fold.index
        return method, options

    kept = {
        "settle": partial(settled, control) if isinstance(control, StageRates) else None,
        "finished": lambda stage: load_stage(run, stage),
        "done": lambda result: save_stage(run, result, plans),
    }
    solve_model(
        model,
        repeated(blocks),
        stream,
        settings,
        metric=recipe.metric,
        energies=curvature and curvature.tokens,
        sequential=recipe.sequential,
        compute=compute,
        moments_dtype=getattr(torch, recipe.moments),
        reference=followed(recipe, stream),
        anchor=combining.combining(recipe, loaded, compute, pages),
        pages=pages,
        lean=True,
        progress=progress,
        **kept,
    )
    if stages := ends(blocks):
        solve_vocabulary(model, stages, curvature.vocabulary, settings, progress=progress, **kept)
    restore(model, repeated(blocks), kept["finished"])


def followed(recipe: Recipe, stream: Stream) -> dict[int, Tensor] | None:
    """The batches whose full-precision inputs are observed beside the others, where targets are outputs."""
    if not recipe.follows_drift:
        return None
    return {index: stream.batches[index] for index in spread(len(stream.batches), recipe.reference_share)}


def export(run: str | Path, to: str, *, verify: bool = True, progress: Progress = silent) -> dict:
    """Write a finished run in one more format; nothing is solved again."""
    run = Path(run)
    recipe = checked(recorded_recipe(run))
    report = read_json(run / "report.json", exports=list, warnings=list)
    given = protected_folder(run) if released(recipe) else None  # then the model it was made of is not needed
    # Nor the plan: what it decided is done.
    loaded, blocks, *_ = prepare(recipe.model_copy(update={"formats": (to,), "plan": None}), given)
    if given is None:
        check_same_model(run, loaded)
    if report.get("protection") and given is None:
        loaded = None
        loaded = load_protected(run, recipe.device)
    for stage in (stage for block in blocks for stage in block.stages):
        solution = load_stage(run, stage)
        if solution is None:
            raise UserError(f"{run} lacks the solution of {stage.name}", fix="run quantize again with --resume")
        install(loaded.model, stage, solution)
    entry = write_export(run, to, loaded, blocks)
    del loaded
    gc.collect()
    if verify:
        entry = verified(run, entry, progress)
    others = [known for known in report["exports"] if known["format"] != to]
    overcome = reporting.told([known for known in report["exports"] if known["format"] == to])
    warnings = [warning for warning in report["warnings"] if warning not in overcome]
    warnings += reporting.told([entry])
    write_report(run, {**report, "exports": [*others, entry], "warnings": warnings})
    raise_failure([entry])
    return entry


def make_plan(recipe: Recipe, progress: Progress = silent) -> dict:
    """What `quantize` would do: sites, sizes, time and memory. Writes nothing.

    Raises UserError for whatever `quantize` would refuse before its first long step.
    """
    split, chosen = load_records(recipe), planned(recipe)
    check_refinement(recipe, split)
    looked = check_protection(recipe, split, chosen)
    loaded, blocks, texts, plan, notes = prepare(recipe, chosen=chosen)
    if recipe.refine:
        material_of(recipe, loaded, texts)
    check_base(recipe, loaded)
    if split and recipe.reference:
        check_same_tokens(recipe.model, loaded.tokenizer, recipe.reference, load_tokenizer(recipe.reference), split)
    notes += looked
    if split and (refusal := check_sides(split, seed=recipe.seed).refusal):
        notes += (f"the audit will give no verdict: {refusal}",)
    if price := announced(recipe, loaded, texts)[0]:
        notes += (price,)
    spent: Cost = cost(loaded, blocks, texts.calibration.tokens.shape, recipe)
    return {
        "model": reporting.model_facts(loaded),
        "sites": plan.to_dict()["sites"],
        "size": reporting.planned_size(loaded, plan, recipe.formats[0] if recipe.formats else "dense"),
        "estimate": {"memory_bytes": spent.memory_bytes, "seconds": spent.seconds, "gemm_flops": spent.flops},
        "warnings": list(notes),
    }

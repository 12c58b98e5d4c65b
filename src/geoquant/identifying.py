"""What weights are for, by what happens to the model when they are changed.

Every group of weights is rounded, zeroed, reverted to the public base..., one at a time; the model is measured before
and after, and labels follow from the effects alone (outliers/taxonomy.py). What an analysis says of the same weights is
then judged by those labels.

    DIR/
      manifest.json          model, texts, grouping and seed; another identification does not go on in this folder
      baseline.json          the model as it is
      effects.jsonl          what was observed after each intervention, a line as soon as it is measured: a killed
                             command goes on, and another --do, --lam or --analysis adds to what is there
      identity.json, identity.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from geoquant.data.records import Record, Split, check_split, load_split
from geoquant.errors import UserError, unknown_name
from geoquant.evaluate.choices import Task
from geoquant.evaluate.tasks import load_task
from geoquant.examine import check_context
from geoquant.folders import begin, claim
from geoquant.inputs import (
    analysis_hash,
    base_scores,
    check_same_model,
    check_same_sites,
    public_windows,
    read_analysis,
    told_of,
)
from geoquant.lines import each_once
from geoquant.manifest import versions
from geoquant.model.identity import described, model_hash
from geoquant.model.load import Loaded, load, locate
from geoquant.model.walk import Site, read_weight, site_modules, walk
from geoquant.outliers.compared import check_comparable, compared, read_identity
from geoquant.outliers.effects import Material, effect, observe, open_baseline
from geoquant.outliers.findings import findings
from geoquant.outliers.groups import Group, Grouping, make_groups, parse_grouping
from geoquant.outliers.identity import Identified, agreements, controls, identified, precision, tests
from geoquant.outliers.interventions import Intervention, parse
from geoquant.outliers.observed import Effect, Observed, contrast
from geoquant.outliers.taxonomy import LEVEL
from geoquant.outliers.verdict import verdict
from geoquant.progress import Progress, silent
from geoquant.reporting import Clock, forget_peak_memory, peak_memory_bytes
from geoquant.runs import read_json, read_tensors, write_json

__all__ = ["identify"]

OURS = ("manifest.json", "baseline.json", "effects.jsonl", "identity.json", "identity.html")


def identify(
    model: str | Path,
    out: str | Path,
    *,
    analysis: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    base: str | Path | None = None,
    private: str | Path | Sequence[str | Record] | None = None,
    domain: str | Path | Sequence[str | Record] | None = None,
    canaries: str | Path | Sequence[Record] | None = None,
    tasks: Sequence[str | Path] = (),
    items: int | None = None,
    text: str | Path | None = None,
    windows: int = 8,
    window: int = 256,
    records: int = 50,
    do: Sequence[str] = (),
    groups: str = "half",
    only: str | None = None,
    lam: float = 0.5,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    command: str = "geoquant.identify",
) -> dict:
    """Label every group of weights by its effects, into folder `out`.

    groups: as in outliers/groups.py. only: leave out layers whose name does not hold this. do: interventions as in
    outliers/interventions.py (default: quantize@3, and revert where a base is given). private, domain, canaries:
    records that the model was trained on, others of the same kind that it has not seen, planted secrets; `records` are
    read of either side. base: calibrates the attack and is what `revert` puts back. text: public text to measure on
    (default: the end of the built-in one). lam: preference for privacy in the overlap weight. analysis: the folder of a
    finished one of this model, judged by the labels. compare: folders of finished identifications whose labels of
    groups of the same name are set against these (of another model, another fine-tune, another seed).

    Returns what identity.json holds. Raises UserError for whatever the user can mend.
    """
    asked = _asked(do, base, seed)
    if not 0 <= lam <= 1:
        raise UserError(f"--lam {lam:g}", wanted="a preference from 0 (function) to 1 (privacy)")
    grouping = parse_grouping(groups)
    told = _told_before(analysis, grouping)
    others = {Path(one): read_identity(Path(one)) for one in compare}
    split = _split(private, domain, canaries, records)
    questions = _questions(tasks, items)
    for one in (model, *(() if base is None else (base,))):
        locate(str(one))
    folder, clock = claim(Path(out), OURS, "an identification"), Clock()
    forget_peak_memory()
    with clock("load"):
        other = None if base is None else load(str(base), device=device)
        reference = None
        if other is not None and split.members:
            reference = base_scores(other, str(base), str(model), (split.members, split.nonmembers), progress)
        base_hash = None if other is None else model_hash(other.model)
        if not any(one.kind == "revert" for one in asked):
            other = None  # before the model is read
        loaded = load(str(model), device=device)
        about = described(loaded)
        if told is not None:
            check_same_model(told, Path(analysis), str(model), about["sha256"])
        check_context(loaded, window)
        public = public_windows(loaded, text, window, windows)
        weights = None if other is None else site_modules(check_same_sites(other, loaded).model)
        chosen = _groups(loaded, grouping, only, analysis, seed, public.tokens[:1, :8])
        for path, one in others.items():
            check_comparable(one, path, [str(do) for do in asked], [group.name for group in chosen], str(grouping))
    material = Material(
        public, split.members, split.nonmembers, split.canaries, reference=reference, tasks=tuple(questions)
    )
    facts = {
        "model": about,
        "base_sha256": base_hash,
        "texts": {
            "public": {"source": public.source, "sha256": public.sha256, "windows": windows, "window": window},
            "private": told_of(split.members),
            "domain": told_of(split.nonmembers),
            "canaries": told_of(split.canaries),
            "tasks": {task.name: {"items": len(task), "sha256": task.sha256} for task in questions},
        },
        "groups": str(grouping),
        "only": only,
        "seed": seed,
        "scores_sha256": analysis_hash(Path(analysis)) if grouping.name == "top" else None,
    }
    begin(folder, facts, command, "an identification")
    with clock("effects"):
        before, found = _effects(folder, loaded, material, chosen, asked, weights, progress)
    with clock("labels"):
        rows = identified(chosen, found, lam)
        agreed = agreements(chosen, found, before)
        judged = _verdicts(told, grouping, rows, seed, progress)
    told_rows = [row.to_dict() for own in rows.values() for row in own]
    report = {
        "schema": 1,
        **facts,
        "settings": {
            "do": [str(one) for one in asked],
            "lam": lam,
            "analysis": None if told is None else str(analysis),
            "compare": [str(path) for path in others],
        },
        "before": _before(found),
        "tests": {"count": tests(found), "level": LEVEL, "precision": precision(found)},
        "rows": told_rows,
        "agreement": agreed,
        "compared": [row for path, one in others.items() for row in compared(told_rows, one, path)],
        "verdicts": judged,
        "controls": controls(rows) if grouping.name == "top" else [],
        "seconds_per_effect": float(np.mean([one.seconds for own in found.values() for one in own.values()])),
        "versions": versions(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    report["findings"] = findings(report)
    from geoquant.report.identity import write_identity

    write_identity(folder, report)
    return report


# ---- what is asked


def _asked(do: Sequence[str], base: object, seed: int) -> list[Intervention]:
    """Each intervention once. Raises UserError for an unknown one, and for `revert` without a base."""
    names = do or ("quantize@3", *(() if base is None else ("revert",)))
    found = list({str(one): one for one in (parse(name, seed) for name in names)}.values())
    if base is None and any(one.kind == "revert" for one in found):
        raise UserError("the intervention 'revert' needs a base model", fix="give the public base with --base")
    return found


def _told_before(analysis: str | Path | None, grouping: Grouping) -> dict | None:
    """What the analysis says, where one is given. Raises UserError where the grouping needs what it lacks."""
    if analysis is None:
        if grouping.name == "top":
            raise UserError(
                f"--groups {grouping} needs the score of an analysis", fix="give its folder with --analysis"
            )
        return None
    told = read_analysis(Path(analysis))
    if grouping.name == "top":
        known = [score["name"] for score in told["scores"] if score["axis"] in ("weight", "column")]
        if grouping.score not in known:
            raise unknown_name("score of columns", grouping.score, known)
    return told


def _split(private: object, domain: object, canaries: object, records: int) -> Split:
    """The first so many records of both sides, checked; empty where none are given."""
    if (private is None) != (domain is None):
        raise UserError("effects on an attack need both sides", wanted="--private and --domain, or neither")
    if private is None:
        if canaries is not None:
            raise UserError("canaries are measured beside records", wanted="--private and --domain as well")
        return Split((), ())
    found = load_split(private, domain, canaries)
    sides = found.members[:records], found.nonmembers[:records]
    check_split(*sides)
    return Split(*sides, found.canaries)


def _questions(tasks: Sequence[str | Path], items: int | None) -> list[Task]:
    found = [load_task(path, items) for path in tasks]
    names = [task.name for task in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two task files are called {double}", fix="rename one of them")
    return found


def _groups(
    loaded: Loaded, grouping: Grouping, only: str | None, analysis: object, seed: int, probe: Tensor
) -> tuple[Group, ...]:
    whole = [site for block in walk(loaded.model, probe) for site in block.sites]
    sites = [site for site in whole if only is None or only in site.name]
    if not sites:
        raise UserError(f"no layer is called like --only {only}", wanted=f"a part of a name like {whole[0].name}")
    pages: dict[int, dict[str, Tensor]] = {}

    def scored(site: Site) -> Tensor:
        if site.block not in pages:
            pages.clear()
            path = Path(analysis) / "scores" / f"{site.block:03d}.safetensors"
            pages[site.block] = read_tensors(path)[0]
        name = f"{site.name}|{grouping.score}|columns"
        if name not in pages[site.block]:
            raise UserError(f"{analysis} holds no {grouping.score} of the columns of {site.name}", fix="analyze again")
        return pages[site.block][name]

    return make_groups(grouping, sites, scored, seed)


# ---- effects


def _effects(
    folder: Path,
    loaded: Loaded,
    material: Material,
    groups: Sequence[Group],
    asked: Sequence[Intervention],
    weights: dict | None,
    progress: Progress,
) -> tuple[Observed, dict[str, dict[str, Effect]]]:
    """The model as it is, and the effect of every intervention on every group; those on disk are not measured again."""
    baseline = folder / "baseline.json"
    named = {str(one): one for one in asked}
    parts = {group.name: group.parts for group in groups}
    own = None if weights is None else lambda site: read_weight(weights[site])

    @cache
    def start() -> Callable[[tuple[str, str]], dict]:
        opened = open_baseline(loaded.model, loaded.tokenizer, material, progress=progress)
        if not baseline.exists():
            write_json(baseline, observe(opened.measured, material).to_dict())

        def measured(job: tuple[str, str]) -> dict:
            do, group = job
            one = effect(opened, parts[group], named[do], base=own, label=group)
            return {"intervention": do, "group": group, "seconds": one.seconds, "after": one.after.to_dict()}

        return measured

    if not baseline.exists():
        # Effects of a baseline that is gone are compared with one that is the same.
        start()
    lines = each_once(
        folder / "effects.jsonl",
        [(do, group) for do in named for group in parts],
        lambda line: (line["intervention"], line["group"]),
        {"intervention", "group", "seconds", "after"},
        start,
        progress,
        "effects",
        lambda job: f"{job[1]} {job[0]}",
    )
    before = Observed.from_dict(read_json(baseline))
    found: dict[str, dict[str, Effect]] = {do: {} for do in named}
    for (do, group), line in lines.items():
        found[do][group] = contrast(before, Observed.from_dict(line["after"]), group, do, line["seconds"])
    return before, found


def _before(found: dict[str, dict[str, Effect]]) -> dict:
    """The model as it is, as the effects have it."""
    one = next((one for own in found.values() for one in own.values() if one.changes[0] < np.inf), None)
    if one is None:
        return {}
    told = {"public": one.public.before}
    told |= {"domain": one.domain.before} if one.domain else {}
    told |= {name: one.attacks[name].auc[0] for name in one.attacks}
    others = {"gap": one.gap, "exposure": one.exposure, "extraction": one.extraction}
    return told | {name: shift.before for name, shift in others.items() if shift is not None}


# ---- the verdict


def _verdicts(
    told: dict | None, grouping: Grouping, rows: dict[str, list[Identified]], seed: int, progress: Progress
) -> list[dict]:
    """Whether the analysis tells what the interventions found, by intervention; or why that was not asked."""
    if told is None:
        return [{"intervention": do, "asked": False, "sentence": "no analysis was given"} for do in rows]
    if grouping.name != "site":
        why = "features are those of whole layers: asked of --groups site alone"
        return [{"intervention": do, "asked": False, "sentence": why} for do in rows]
    by_site = {site["name"]: site["scores"] for site in told["sites"]}
    made = []
    for done, (do, own) in enumerate(rows.items(), 1):
        names = [score["name"] for score in told["scores"]]
        values = [[by_site[row.group.name].get(name, {}).get("value") for name in names] for row in own]
        features = np.array([[np.nan if v is None else v for v in row] for row in values], float)
        known = np.isfinite(features).all(0)
        kept = [name for name, use in zip(names, known) if use]
        places = {"blocks": [row.group.block for row in own], "kinds": [row.group.kind for row in own]}
        found = verdict(features[:, known], [row.label.name for row in own], kept, **places, seed=seed)
        told_so = {
            "intervention": do,
            "asked": True,
            "sentence": found.sentence,
            "features": list(found.features),
            "questions": [asdict(question) for question in found.questions],
        }
        made.append(told_so)
        progress("verdict", done, len(rows), do)
    return made

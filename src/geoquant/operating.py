"""One point of a frontier: made, measured, written down. As a process of its own: `python -m geoquant.operating JOB`.

OUT/original/             measurements of the original and of the base, which every point is compared with
OUT/points/NAME/          the run of one point; once measured only its report and manifest are kept
OUT/taught/               what levers measured and models they made: for all points that need the same
OUT/measured/NAME.json    what the frontier reads: figures, and values by window and by record for paired errors
OUT/jobs/NAME.json        what was asked for
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from geoquant.auditing import attack, load_records
from geoquant.costs import CHANGE
from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.evaluate.tasks import answer, load_task
from geoquant.examine import check_context
from geoquant.measure import measure_original, prepare_texts, score_model, score_reference
from geoquant.model.load import load, load_tokenizer
from geoquant.pipeline import quantize
from geoquant.plan.points import ORIGINAL, Change, Point
from geoquant.privacy.attacks import membership_scores
from geoquant.privacy.evidence import gather
from geoquant.privacy.exposure import exposure
from geoquant.privacy.guarantee.inherited import inherit
from geoquant.privacy.scores import SplitScores, load_scores
from geoquant.privacy.scoring import check_same_tokens
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe, checked
from geoquant.reporting import Clock, model_facts
from geoquant.runs import PARTIAL, read_json, write_json
from geoquant.variants import write_variant

__all__ = ["TAUGHT", "Job", "job_path", "measured_path", "operate", "read_job"]

TAUGHT = "taught"

KEPT = ("manifest.json", "report.json", "report.html", "released.json")


@dataclass(frozen=True)
class Job:
    """What one point is: everything that decides its numbers is in `key`."""

    out: str
    key: str
    point: Point
    recipe: dict
    base: str | None = None
    tasks: tuple[str, ...] = ()
    items: int | None = None
    keep: bool = False
    command: str = ""


def job_path(out: Path, name: str) -> Path:
    """Where what was asked for stands."""
    return out / "jobs" / f"{name}.json"


def measured_path(out: Path, name: str) -> Path:
    """Where what was found stands."""
    return out / "measured" / f"{name}.json"


def read_job(path: Path) -> Job:
    """A job as `asdict` wrote it."""
    told = read_json(path, point=dict, recipe=dict)
    change = told["point"]["change"]
    point = {**told["point"], "change": change and Change(**change), "needs": tuple(told["point"]["needs"])}
    recipe = {name: tuple(value) if isinstance(value, list) else value for name, value in told["recipe"].items()}
    return Job(**{**told, "point": Point(**point), "recipe": recipe, "tasks": tuple(told["tasks"])})


def operate(job: Job, progress: Progress = silent) -> dict:
    """Make and measure the point; returns what OUT/measured/NAME.json holds. Raises UserError."""
    out, point, clock = Path(job.out), job.point, Clock()
    run = out / ORIGINAL if point.name == ORIGINAL else out / "points" / point.name
    old = job_path(out, point.name)
    if point.name != ORIGINAL and run.exists() and (not old.exists() or read_json(old).get("key") != job.key):
        shutil.rmtree(run)  # of another point with this name
    write_json(old, asdict(job))
    with clock("all"), _weights(job, clock, progress) as model:
        recipe = checked({**job.recipe, "model": model})
        found = (_quantized if point.quantize else _as_it_is)(job, recipe, run, progress)
        if point.statement:
            found["guarantee"] = _inherited(point, model)
    if "timings" in found:
        found["timings"] |= {name: seconds for name, seconds in clock.seconds.items() if name != "all"}
    found |= {"key": job.key, "name": point.name, "seconds": clock.seconds["all"]}
    write_json(measured_path(out, point.name), found)
    if point.quantize and not job.keep:
        for entry in run.iterdir():
            if entry.name not in KEPT:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return found


@contextmanager
def _weights(job: Job, clock: Clock, progress: Progress) -> Iterator[str]:
    """The model that the point starts from; a changed one lies in a folder that is gone afterwards."""
    model = job.point.model or job.recipe["model"]
    if job.point.change is None:
        yield model
        return
    folder = Path(job.out) / f"{PARTIAL}weights-{job.point.name}"
    try:
        progress("weights", 0, 1, job.point.change.words)
        with clock(CHANGE):
            write_variant(folder, model, job.base, job.point.change, seed=job.recipe.get("seed", 0))
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_it_is(job: Job, recipe: Recipe, folder: Path, progress: Progress) -> dict:
    """A model measured without being quantized."""
    original = Path(job.out) / ORIGINAL
    split = load_records(recipe)
    base = None
    if split and recipe.reference:
        if not (path := original / "base_scores.safetensors").exists():
            tokenizers = recipe.model, load_tokenizer(recipe.model), recipe.reference, load_tokenizer(recipe.reference)
            check_same_tokens(*tokenizers, split)
        base = score_reference(path, recipe.reference, split, recipe.device, progress)
    loaded = load(recipe.model, device=recipe.device)
    check_context(loaded, recipe.window)
    text = prepare_texts(loaded.tokenizer, recipe).evaluation
    found = measure_original(folder, loaded.model, text, progress).perplexity
    scores = privacy = None
    if split:
        path = folder / "original_scores.safetensors"
        scores = score_model(path, loaded.model, loaded.tokenizer, split, progress, "scores")
        privacy = attack(split, {"base": base, "quantized": scores}, recipe.seed)
    facts = model_facts(loaded)
    width = 8 * facts["bytes"] / facts["parameters"]
    told = {
        "model": {name: facts[name] for name in ("name", "architecture", "parameters", "source", "dtype", "sha256")},
        "bits": {"all_in": width, "coded": None, "share": 0.0, "embeddings": False, "kept": 0.0},
        "public": {**found.to_dict(), "text": text.source, "scored": text.scored},
        "tasks": _tasks(job, loaded.model, loaded.tokenizer, progress),
        "guarantee": None,
        "warnings": [],
    }
    return told | _of_records(split, base, scores, privacy)


def _quantized(job: Job, recipe: Recipe, run: Path, progress: Progress) -> dict:
    """The run of a point, and what it found."""
    original = Path(job.out) / ORIGINAL
    recipe = checked(
        {**recipe.model_dump(exclude_unset=True), "formats": ("dense",) if job.tasks else (), "verify": False}
    )
    again = (run / "manifest.json").exists()
    told = {"known": original, "shared": Path(job.out) / TAUGHT, "progress": progress, "command": job.command}
    report = quantize(recipe, run, resume=again, **told)
    split = load_records(recipe)
    base = scores = None
    if split:
        scores = load_scores(run / "quantized_scores.safetensors", split)
        base = load_scores(original / "base_scores.safetensors", split) if recipe.reference else None
    tasks = []
    if job.tasks:
        loaded = load(str(run / "dense"), device=recipe.device)
        tasks = _tasks(job, loaded.model, loaded.tokenizer, progress)
    privacy = report["privacy"]
    told = {
        "bits": _bits(report),
        "public": read_json(run / "quantized.json", perplexity=dict)["perplexity"],
        "kl": report["quality"]["kl"],
        "tasks": tasks,
        "guarantee": (privacy or {}).get("guarantee"),
        "warnings": report["warnings"],
        "timings": report["timings"],
        "borrowed": _borrowed(report),
        "resumed": again,
    }
    return told | _of_records(split, base, scores, privacy)


def _borrowed(report: dict) -> float | None:
    """Seconds of what the run needed and found: another point of the frontier had measured or made it."""
    protection = report["protection"] or {}
    found = [protection.get(name) for name in ("making", "measuring")]
    return next((one["seconds"] for one in found if one is not None and not one["here"]), None)


def _bits(report: dict) -> dict:
    """Bits per parameter of the whole model (what is not coded counts as stored), and per coded weight alone."""
    sites, parameters = report["sites"], report["model"]["parameters"]
    weights = [math.prod(site["shape"]) for site in sites]
    coded, stored = sum(weights), 8 * report["size"]["original_bytes"] / parameters
    bits = sum(site["bits_per_weight"] * count for site, count in zip(sites, weights, strict=True))
    return {
        "all_in": (bits + (parameters - coded) * stored) / parameters,
        "coded": bits / coded,
        "share": coded / parameters,
        "embeddings": any(site["kind"] in ("embedding", "head", "tied") for site in sites),
        "kept": sum(site["kept"] * site["shape"][0] for site in sites) / coded,
    }


def _of_records(
    split: Split | None, base: SplitScores | None, scores: SplitScores | None, privacy: dict | None
) -> dict:
    """What the records show: figures of the audit, and values record by record for paired comparisons."""
    if split is None or scores is None or privacy is None:
        return {"domain": None, "scores": {}, "privacy": None}
    sides = (
        gather(
            getattr(split, side),
            getattr(scores, side),
            base and getattr(base, side),
            getattr(scores, f"lowered_{side}"),
        )
        for side in ("members", "nonmembers")
    )
    outside = scores.nonmembers
    loss = -outside.record_sums(outside.log_prob) / np.maximum(outside.lengths, 1)
    control = exposure(scores.withheld, split.withheld) if scores.withheld else None
    ours = {
        part: [row for row in privacy.get(part) or [] if row["subject"] == "quantized"]
        for part in ("attacks", "extraction", "exposure", "verdict")
    }
    ours["attacks"] = [{key: value for key, value in row.items() if key != "roc"} for row in ours["attacks"]]
    return {
        "domain": [_number(value) for value in loss[outside.lengths > 0]],
        "scores": {
            name: [[_number(value) for value in side] for side in both]
            for name, both in membership_scores(*sides).items()
        },
        "privacy": {
            **ours,
            "exposure_control": control and control.mean_bits,
            "no_verdict": privacy.get("no_verdict"),
            "warnings": privacy.get("warnings", []),
            "n_members": privacy["n_members"],
            "n_nonmembers": privacy["n_nonmembers"],
        },
    }


def _number(value: float) -> float | None:
    """Seven digits; None for minus infinity, the score of a record that nothing speaks for."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _tasks(job: Job, model: nn.Module, tokenizer, progress: Progress) -> list[dict]:
    """Accuracy on every task, and which items were right, for the paired error."""
    found = (answer(model, tokenizer, load_task(path, job.items), progress=progress) for path in job.tasks)
    return [{**one.to_dict(), "correct": [int(right) for right in one.correct]} for one in found]


def _inherited(point: Point, model: str) -> dict:
    """What the trainer of a model states of all its tensors; what is computed from it keeps that."""
    loaded = load(model)
    tensors = {name: own.detach() for name, own in loaded.model.named_parameters()}
    told = inherit(Path(point.statement), tensors, {}, tensors).guarantee.to_dict()
    del loaded, tensors
    gc.collect()
    return told


def main() -> int:
    """Do the job of a file. 0 done, 2 a UserError, whose line is the last of stderr."""
    try:
        operate(read_job(Path(sys.argv[1])))
    except UserError as error:
        print(json.dumps(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

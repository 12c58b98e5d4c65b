"""The frontier: what can be had of size, quality and leakage, measured point by point on one model.

OUT/
  manifest.json         the model, the records and the settings; another frontier does not go on in this folder
  original/             measured once: what every point is compared with
  points/NAME/          the report of each point's run
  measured/NAME.json    what was measured of it; a point that is there is not made again
  taught/               what levers measured of weights and records, and made of them, for all points that need it
  jobs/, logs/          what was asked for; what went wrong
  frontier.json, frontier.html
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from geoquant.auditing import load_records
from geoquant.comparing import against_baselines, beside_published, check_chosen
from geoquant.control import control_matrix
from geoquant.errors import UserError
from geoquant.evaluate.tasks import load_task
from geoquant.folders import begin, claim, made
from geoquant.manifest import versions
from geoquant.model.load import identity, locate
from geoquant.operating import TAUGHT, Job, job_path, measured_path, operate
from geoquant.plan.default_points import default_points
from geoquant.plan.points import INPUTS, ORIGINAL, Point, check_names, fitting
from geoquant.plan.uniform import check_choices
from geoquant.progress import Progress, silent
from geoquant.recipe import checked, located
from geoquant.runs import check_writable, file_hash, read_json, write_json

__all__ = ["frontier"]

CONTENTS = "3"  # of frontier.json: where it changes, one that is there is made again from what was measured
OURS = ("manifest.json", "original", "points", "measured", "jobs", "logs", TAUGHT, "frontier.json", "frontier.html")
FILES = ("members", "nonmembers", "canaries", "private", "domain", "evaluation", "calibration")
ELSEWHERE = {
    *FILES,
    "model",
    "reference",
    "base",
    "device",
}  # options that are told by their content, or change nothing


def frontier(
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    private: str | Path | None = None,
    domain: str | Path | None = None,
    points: Sequence[Point] | None = None,
    tasks: Sequence[str | Path] = (),
    items: int | None = None,
    dp: Mapping[str, str] | None = None,
    jobs: int = 1,
    keep: bool = False,
    chosen: str | None = None,
    options: Mapping[str, object] | None = None,
    progress: Progress = silent,
    command: str = "geoquant.frontier",
) -> dict:
    """Make and measure every operating point of `model` in folder `out`; returns what frontier.json holds.

    base: the public model it was fine-tuned from; calibrates the attack and serves the levers. private, domain: records
    that levers may look at, no records of the audit. points: plan/points.py; without them the default list, of which
    those that cannot be made are left out and named. tasks: files of questions (evaluate/tasks.py), of each the first
    `items`. dp: folders of models trained with DP-SGD, each with the trainer's statement. jobs: processes at a time.
    keep: whole run folders, not only their reports. chosen: the point that is compared with the baselines, by its name
    or by a goal (default: comparing.pick). options: of the recipe that all points share (members, nonmembers, canaries,
    windows, seed...).

    A point that fails is named and the others go on. Raises UserError for what the user can mend.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}", wanted="at least 1")
    inputs = {
        name: str(value) for name, value in zip(INPUTS, (base, private, domain), strict=True) if value is not None
    }
    shared = _shared(str(model), inputs.get("base"), dict(options or {}))
    given = default_points() if points is None else tuple(points)
    given += _trained(dp or {})
    check_names(given)
    if not given or given[0].name != ORIGINAL:
        raise UserError("the first point of a frontier is the original", got=given[0].name if given else "no points")
    kept, left = fitting(given, inputs)
    if points is not None and left:
        raise UserError(left[0])
    check_chosen(chosen, [point.name for point in kept])
    recipes = {point.name: _recipe(point, shared, inputs) for point in kept}
    for point in kept:
        if point.quantize:
            check_choices(checked({**recipes[point.name]}))
    split = load_records(checked(shared))
    for path in tasks:
        load_task(path, items)
    folder = claim(Path(out), OURS, "a frontier")
    check_writable(folder / "manifest.json")
    facts = _facts(shared, inputs, tasks, items)
    key = begin(folder, facts, command, "a frontier", "points", "measured", "jobs", "logs")
    asked = [
        Job(
            str(folder),
            _key(key, point, shared),
            point,
            recipes[point.name],
            inputs.get("base"),
            tuple(map(str, tasks)),
            items,
            keep,
            command,
        )
        for point in kept
    ]
    parts = [CONTENTS, chosen or "", *(job.key for job in asked)]
    whole = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    if (known := _finished(folder, asked, whole)) is not None:
        return known
    started = time.perf_counter()
    failed = _all_of(folder, asked, jobs, progress)
    if ORIGINAL in failed:
        raise UserError(f"the original could not be measured: {failed[ORIGINAL]}")
    done = [point for point in kept if point.name not in failed]
    measured = [read_json(measured_path(folder, point.name)) for point in done]
    matrix = control_matrix(done, measured)
    report = {
        "schema": 1,
        "key": whole,
        "model": measured[0]["model"],
        **facts,
        **matrix,
        "baselines": against_baselines(matrix, measured, chosen),
        "published": beside_published(matrix["rows"], measured, matrix["attacks"]["primary"]),
        "records": split
        and {"sha256": split.sha256, "members": len(split.members), "nonmembers": len(split.nonmembers)},
        "no_verdict": (measured[0]["privacy"] or {}).get("no_verdict"),
        "text": {name: measured[0]["public"][name] for name in ("text", "tokens")},
        "left_out": list(left),
        "failed": [{"name": name, "error": why} for name, why in failed.items()],
        "seed": shared.get("seed", 0),
        "versions": versions(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started,
    }
    from geoquant.report.frontier import write_frontier

    write_frontier(folder, report)
    return report


# ---- what is asked for


def _shared(model: str, base: str | None, options: dict) -> dict:
    """The options that all points share. Raises UserError for one that points decide."""
    values = {"model": model, **options}
    if base is not None and "members" in values:
        values.setdefault("reference", base)
    recipe = located(checked(values))
    decided = sorted(set(options) & {"grid", "rate", "bits", "group_size", "method", "embeddings", "anchor", "aim"})
    if decided:
        raise UserError(f"points decide {' and '.join(decided)}", fix="write a file of points, and give --points FILE")
    locate(recipe.model)
    return {name: getattr(recipe, name) for name in values}


def _recipe(point: Point, shared: Mapping, inputs: Mapping) -> dict:
    """What the point's run is asked for."""
    own = {name: inputs[name] for name in point.needs if point.quantize}
    return {**shared, **own, **point.recipe, **({"model": point.model} if point.model else {})}


def _trained(dp: Mapping[str, str]) -> tuple[Point, ...]:
    """Models trained with DP-SGD, as they are and on the lattice."""
    found = []
    for folder, statement in dp.items():
        locate(folder)
        if not Path(statement).is_file():
            raise UserError(
                f"--dp {folder}: no statement {statement}",
                wanted="a JSON file with epsilon, delta, adjacency, mechanism and who: no epsilon without them",
            )
        where = {"model": os.path.abspath(folder), "statement": os.path.abspath(statement)}
        name = f"DP-SGD {Path(folder).name}"
        found += [
            Point(name, "dp", quantize=False, **where),
            Point(f"{name}, lattice 3.25", "dp", {"rate": 3.25}, **where),
        ]
    return tuple(found)


def _facts(shared: Mapping, inputs: Mapping, tasks: Sequence, items: int | None) -> dict:
    """Everything that decides the numbers of all points, told by content."""
    values = {**shared, **inputs}
    models = {name: values[name] for name in ("model", "reference", "base") if values.get(name)}
    # Numbered: files of one name may lie in two folders, and rows are compared task by task, in this order.
    numbers = [f"task {index}" for index in range(1, len(tasks) + 1)] if len(tasks) > 1 else ["task"]
    return {
        "hashes": {
            **{name: identity(*locate(spec)[:2]) for name, spec in models.items()},
            **{name: file_hash(_there(values[name])) for name in FILES if values.get(name)},
            **{f"{task} {Path(path).name}": file_hash(Path(path)) for task, path in zip(numbers, tasks)},
        },
        "settings": {name: value for name, value in shared.items() if name not in ELSEWHERE}
        | ({"items": items} if items else {}),
    }


def _there(path: str, wanted: str = ".txt or .jsonl") -> Path:
    if not Path(path).is_file():
        raise UserError(f"no file {path}", wanted=wanted)
    return Path(path)


def _key(key: str, point: Point, shared: Mapping) -> str:
    """What the point's numbers depend on: the frontier, what it changes, and of another model its weights."""
    told = [key, asdict(point), *([identity(*locate(point.model)[:2])] if point.model else [])]
    told += [file_hash(_there(path, "a file")) for path in (point.statement, point.recipe.get("plan")) if path]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()


# ---- doing it


def _all_of(folder: Path, asked: Sequence[Job], jobs: int, progress: Progress) -> dict[str, str]:
    """Do what is not there yet, the original first; why the points that failed did."""
    missing = [job for job in asked if not _done(folder, job)]
    failed: dict[str, str] = {}
    first = [job for job in missing if job.point.name == ORIGINAL]
    rest = [job for job in missing if job.point.name != ORIGINAL]
    count, over = len(missing), 0

    def ended(job: Job, why: str | None) -> None:
        nonlocal over
        over += 1
        if why is not None:
            failed[job.point.name] = why
        progress("points", over, count, job.point.name if why is None else f"{job.point.name} failed: {why}")

    for part in (first, rest):
        if jobs == 1 or len(part) < 2:
            for job in part:
                told = _told(job, lambda note: progress("points", over, count, note))
                ended(job, _here(folder, job, told))
        else:
            _apart(folder, part, jobs, ended)
        if ORIGINAL in failed:
            break
    return failed


def _told(job: Job, say: Callable[[str], None]) -> Progress:
    """What a point is at, as a note beside the count of points."""
    return lambda phase, done, total, note="": say(f"{job.point.name}: {phase} {done}/{total}")


def _finished(folder: Path, asked: Sequence[Job], whole: str) -> dict | None:
    """The frontier of these very points where nothing is left to do: then no file is touched."""
    if not all((folder / name).exists() for name in ("frontier.json", "frontier.html")):
        return None
    known = read_json(folder / "frontier.json", rows=list)
    same = known.get("key") == whole and not known.get("failed")
    return known if same and all(_done(folder, job) for job in asked) else None


def _done(folder: Path, job: Job) -> bool:
    path = measured_path(folder, job.point.name)
    try:
        return path.exists() and read_json(path).get("key") == job.key
    except UserError:  # damaged: made again
        return False


def _here(folder: Path, job: Job, progress: Progress) -> str | None:
    """Do it in this process."""
    try:
        operate(job, progress)
    except UserError as error:
        return str(error)
    except Exception as error:
        log = made(folder / "logs") / f"{job.point.name}.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error} (a bug: see {log})"
    return None


def _apart(folder: Path, asked: Sequence[Job], jobs: int, ended: Callable[[Job, str | None], None]) -> None:
    """Do them in `jobs` processes at a time that share the threads; one that dies takes no other with it."""
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    waiting, running = list(asked), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                running[_start(folder, job, threads)] = job
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                ended(job, None if process.returncode == 0 else _why(folder, job, process.returncode))
            time.sleep(0.05)
    finally:
        for process in running:  # on Ctrl-C: what they have finished is kept
            process.terminate()
        for process in running:
            process.wait()


def _start(folder: Path, job: Job, threads: int) -> subprocess.Popen:
    path = job_path(folder, f"{job.point.name}.asked")
    write_json(path, asdict(job))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (folder / "logs" / f"{job.point.name}.log").open("wb") as log:
        words = [sys.executable, "-m", "geoquant.operating", str(path)]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _why(folder: Path, job: Job, code: int) -> str:
    """What a process that failed said last."""
    log = folder / "logs" / f"{job.point.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code == 2 and lines and lines[-1].startswith('"'):
        return str(json.loads(lines[-1]))
    if code < 0:
        return f"its process was killed by signal {-code} (out of memory?)"
    return f"{lines[-1] if lines else f'exit code {code}'} (a bug: see {log})"

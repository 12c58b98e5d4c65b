"""Choosing what no forecast can: recipes tried, measured and tried again, until the goal is met as cheaply as it gets.

The objective is measured: the loss after compression, the attack on records that serve the search alone, the size.
Among trials that meet the goals the one of least loss is best; where none does, the one that misses them by least.

Records for the search and for the final audit are disjoint: which side a record is on is decided by a hash of its
text, so that no later run can mix them. What was tuned against an attack is judged by one it was not tuned against.

    TUNE/journal.log        every trial, whoever ran it (Optuna's journal): the search goes on from it
         search/, final/    members.jsonl, nonmembers.jsonl of either side
         trials/0007/       the run folder of a trial
         taught/            what an aimed anchor measured of the weights and records, for all trials
         tune.json          settings; and of a finished search the best trial
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geoquant.data.records import Record, check_split, read_records, write_records
from geoquant.errors import UserError, missing_package, unknown_name
from geoquant.folders import made
from geoquant.plan.bandit import POLICIES
from geoquant.plan.space import SPACE, Dimension, check_space, probes
from geoquant.recipe import Recipe, checked
from geoquant.runs import check_writable, read_json, write_json

if TYPE_CHECKING:
    import optuna

__all__ = ["SPACE", "Dimension", "Goal", "Measure", "Outcome", "halves", "measure_run", "tune"]

JOURNAL, SETTINGS = "journal.log", "tune.json"
SAMPLERS = ("tpe", "gp", "random", *POLICIES)
SPREAD = 0.1  # of losses, nats per token: the bandits' unit
MISSED = 10.0  # nats: what a missed goal counts for a bandit, times the relative miss


@dataclass(frozen=True)
class Outcome:
    """What a trial measured: loss in nats per token, leak (attack advantage, 0 to 1), size in MB."""

    loss: float
    leak: float
    size: float


@dataclass(frozen=True)
class Goal:
    """Largest leak and size; None: as much as it takes."""

    leak: float | None = None
    size: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"--max-{name} {value}", wanted="a number from 0")

    def missed(self, outcome: Outcome) -> tuple[float, float]:
        """By which share of them the goals are missed; at most 0 where they are met."""
        pairs = ((outcome.leak, self.leak), (outcome.size, self.size))
        return tuple(-1.0 if limit is None else (value - limit) / max(abs(limit), 1e-3) for value, limit in pairs)

    def order(self, outcome: Outcome) -> tuple[float, float]:
        """Smaller is better: first the worst miss, then the loss."""
        return max(0.0, *self.missed(outcome)), outcome.loss


Measure = Callable[[Recipe, Path], Outcome]


# ---- records


def halves(records: Sequence[Record], share: float = 0.5) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(for the search, for the final audit): by a hash of the text alone, so the same record is always on one side."""
    sides: tuple[list[Record], list[Record]] = [], []
    for record in records:
        digest = hashlib.sha256(b"tune or audit\0" + record.text.strip().encode()).digest()
        sides[int.from_bytes(digest[:8], "big") / 2**64 >= share].append(record)
    return tuple(sides[0]), tuple(sides[1])


def check_disjoint(search: Sequence[Record], final: Sequence[Record]) -> None:
    """Raise UserError where a record is on both sides."""
    if shared := {record.text.strip() for record in search} & {record.text.strip() for record in final}:
        raise UserError(
            f"{len(shared)} records are both for tuning and for the final audit",
            wanted="an audit on records that nothing was tuned against",
            fix="let geoquant tune split them",
        )


def _sides(recipe: Recipe) -> dict[str, tuple[tuple[Record, ...], tuple[Record, ...]]]:
    """Members and non-members, each (for the search, for the final audit). Raises UserError."""
    if recipe.members is None or recipe.nonmembers is None:
        raise UserError("tuning measures an attack", wanted="--members F and --nonmembers F")
    if recipe.canaries is not None:
        raise UserError("canaries belong to the final audit", fix="leave --canaries out, and give them to audit")
    sides = {name: halves(read_records(getattr(recipe, name))) for name in ("members", "nonmembers")}
    for place, part in enumerate(("search", "final audit")):
        try:
            check_split(sides["members"][place], sides["nonmembers"][place])
        except UserError as error:
            raise UserError(f"the half of the records that is for the {part}: {error}") from None
    check_disjoint(*(sum((own[place] for own in sides.values()), ()) for place in (0, 1)))
    return sides


def _divided(recipe: Recipe, sides: Mapping[str, Sequence[Sequence[Record]]], folder: Path) -> Recipe:
    """The recipe of the trials, whose records are those of the search; both halves are written to the folder."""
    for place, part in enumerate(("search", "final")):
        for name, own in sides.items():
            write_records(folder / part / f"{name}.jsonl", own[place])
    return recipe.model_copy(update={name: str(folder / "search" / f"{name}.jsonl") for name in sides})


def check_run(recipe: Recipe) -> None:
    """Everything that `quantize` would refuse before its first long step; the model is read for that, nothing written.
    Raises UserError."""
    from geoquant.pipeline import make_plan

    make_plan(recipe)


def measure_run(recipe: Recipe, folder: Path) -> Outcome:
    """Run the whole pipeline in `folder`, TUNE/trials/NUMBER, or read what it left there. leak: the largest
    `|2 AUC - 1|` of all attacks on the compressed model."""
    from geoquant.pipeline import quantize

    report = quantize(recipe, folder, resume=folder.exists(), shared=folder.parents[1] / "taught")
    attacks = [one for one in report["privacy"]["attacks"] if one["subject"] == "quantized"]
    return Outcome(
        loss=report["quality"]["quantized"]["nll"],
        leak=max(abs(2 * one["auc"] - 1) for one in attacks),
        size=report["size"]["total_bytes"] / 1e6,
    )


# ---- the search


def tune(
    recipe: Recipe,
    out: str | Path,
    goal: Goal,
    *,
    trials: int = 20,
    workers: int = 1,
    sampler: str = "tpe",
    patience: int = 10,
    space: Sequence[Dimension] = SPACE,
    seed: int = 0,
    measure: Measure = measure_run,
    check: Callable[[Recipe], None] = check_run,
) -> dict:
    """Search `space` with so many trials in all, in several processes; stops early when the last `patience` finished
    trials brought nothing better. A folder that holds a search of the same settings goes on with it.

    sampler: `tpe`, `gp`, `random`, or a bandit (`ucb`, `thompson`) over the first dimension's levels, the others as in
    the recipe. Workers that end together may add a trial each; a trial that was killed is tried anew. check: looks at a
    trial's recipe, with the records of both halves, before a folder is made. Returns what tune.json holds. Raises
    UserError, where it can before anything is written.
    """
    _optuna()
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    for name, given in (("trials", trials), ("workers", workers), ("patience", patience)):
        if given < 1:
            raise UserError(f"--{name} {given}", wanted="at least 1")
    check_space(space)
    if recipe.plan is not None:
        raise UserError("the search chooses what a plan has chosen", got=f"--plan {recipe.plan}", fix="leave it out")
    if recipe.base is None and any(one.field == "anchor" for one in space):
        raise UserError("the search moves the anchor", wanted="--base MODEL, the one it was fine-tuned from")
    if goal.size is not None and not recipe.formats:
        raise UserError("a size is that of an exported model", got="no format", wanted="--format, at least one")
    asked = [_trial(recipe, values) for values in probes(space, levels=sampler in POLICIES)]
    folder = Path(out)
    settings = {
        "recipe": recipe.model_dump(mode="json"),
        "goal": asdict(goal),
        "space": [asdict(one) for one in space],
        "sampler": sampler,
        "seed": seed,
    }
    new = _is_new(folder, settings)
    sides = _sides(recipe)
    if new:
        check(asked[-1])
    folder = made(folder)
    own = _divided(recipe, sides, folder)
    write_json(folder / SETTINGS, {"settings": settings, "best": None})
    _study(folder, sampler, seed)  # once, before anyone shares it
    work = partial(_work, folder, own, goal, trials, sampler, patience, tuple(space), seed, measure)
    if workers == 1:
        work(0)
    else:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=work, args=(number,)) for number in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := [process.exitcode for process in processes if process.exitcode]:
            raise UserError(
                f"{len(failed)} of {workers} workers failed", fix="the same command goes on from the journal"
            )
    done = _finished(_study(folder, sampler, seed))
    best = min(done, key=lambda trial: goal.order(_outcome(trial)))
    told = {
        "settings": settings,
        "best": {
            "trial": best.number,
            "values": dict(best.params),
            "outcome": asdict(_outcome(best)),
            "meets_the_goal": goal.order(_outcome(best))[0] == 0,
            "run": str(_run(folder, best.number)),
        },
        "trials": [{"trial": one.number, "values": dict(one.params), **asdict(_outcome(one))} for one in done],
        "final_audit": {name: str(folder / "final" / f"{name}.jsonl") for name in ("members", "nonmembers")},
    }
    write_json(folder / SETTINGS, told)
    return told


def _is_new(folder: Path, settings: Mapping) -> bool:
    """Whether no search is there yet. Raises UserError for another search, and for a place where none can be."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file", wanted="a folder")
        new = not (folder / SETTINGS).exists()
        if new and folder.exists() and any(folder.iterdir()):
            raise UserError(f"output folder {folder} is not empty", fix="choose a new folder")
        if new:
            check_writable(folder / SETTINGS)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out folder") from None
    if not new:
        known = read_json(folder / SETTINGS, settings=dict)["settings"]
        if other := [name for name in settings if known.get(name) != settings[name]]:
            raise UserError(f"{folder} holds a search of another {other[0]}", fix="choose a new --out folder")
    return new


def _trial(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    """What a trial runs. Raises UserError for a value that the recipe does not take."""
    bare = {}
    if values.get("anchor") == 0 and not (recipe.refine and recipe.private):
        # Nothing goes back to a base that serves nothing else.
        bare = dict.fromkeys(("base", "private", "domain")) | {"aim": "everything"}
    return checked({**recipe.model_dump(), **values, **bare})


def _work(
    folder: Path,
    recipe: Recipe,
    goal: Goal,
    trials: int,
    sampler: str,
    patience: int,
    space: tuple[Dimension, ...],
    seed: int,
    measure: Measure,
    worker: int,
) -> None:
    """One process: trials until there are enough of them, or nothing better has come for long."""
    study = _study(folder, sampler, seed + worker)

    def objective(trial: optuna.trial.Trial) -> float:
        values = {
            one.field: trial.suggest_categorical(one.field, one.grid())
            if sampler in POLICIES
            else trial.suggest_float(one.field, one.low, one.high, log=one.log)
            for one in (space[:1] if sampler in POLICIES else space)
        }
        found = measure(_trial(recipe, values), _run(folder, trial.number))
        trial.set_user_attr("outcome", asdict(found))
        trial.set_user_attr("missed", goal.missed(found))
        return found.loss

    while True:
        done = _finished(study)
        if len(done) >= trials or _stale(done, goal, patience):
            return
        if sampler in POLICIES:
            _enqueue(study, done, goal, space[0], sampler, seed)
        study.optimize(objective, n_trials=1)


def _enqueue(study: optuna.Study, done: Sequence, goal: Goal, arms: Dimension, policy: str, seed: int) -> None:
    """The arm that the policy takes next, as the study's next trial."""
    grid = arms.grid()
    tries: list[list[float]] = [[] for _ in grid]
    for trial in done:
        missed, loss = goal.order(_outcome(trial))
        tries[grid.index(trial.params[arms.field])].append(-loss - MISSED * missed)
    rng = np.random.default_rng([seed, len(done)])
    study.enqueue_trial({arms.field: grid[POLICIES[policy](tries, rng, SPREAD)]})


def _stale(done: Sequence, goal: Goal, patience: int) -> bool:
    """Whether the best trial is `patience` finished trials ago."""
    if len(done) <= patience:
        return False
    ordered = sorted(done, key=lambda trial: (trial.datetime_complete, trial.number))
    orders = [goal.order(_outcome(trial)) for trial in ordered]
    return min(orders[:-patience]) <= min(orders[-patience:])


def _finished(study: optuna.Study) -> list:
    from optuna.trial import TrialState

    return [one for one in study.get_trials(deepcopy=False) if one.state == TrialState.COMPLETE]


def _outcome(trial: optuna.trial.FrozenTrial) -> Outcome:
    return Outcome(**trial.user_attrs["outcome"])


def _run(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _study(folder: Path, sampler: str, seed: int) -> optuna.Study:
    """The search in the folder's journal. Missed goals are constraints: less than a miss is never preferred."""
    optuna = _optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def constraints(trial: Mapping) -> Sequence[float]:
        return trial.user_attrs.get("missed", (math.inf, math.inf))

    made = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constraints_func=constraints),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, constraints_func=constraints),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }.get(sampler, lambda: optuna.samplers.RandomSampler(seed=seed))
    return optuna.create_study(
        study_name="tune",
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        sampler=made(),
        direction="minimize",
        load_if_exists=True,
    )


def _optuna():
    try:
        import optuna
    except ImportError:
        raise missing_package("optuna", "tune", "tune") from None
    return optuna

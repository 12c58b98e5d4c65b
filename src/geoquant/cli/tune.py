"""`geoquant tune`: a search over recipes, each measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Json, Model, RecipeFlags
from geoquant.cli.screen import library, output, progress_display

__all__ = ["tune"]

GOALS = "Search"


def tune(
    model: Model | None = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder for the search: new, or of the same search to go on with.")],
    recipe: Annotated[Path | None, Parameter(help="TOML file with these options; flags win.")] = None,
    max_leak: Annotated[
        float | None, Parameter(help="Attack advantage, largest |2 AUC - 1| of all attacks, 0 to 1.", group=GOALS)
    ] = None,
    max_size: Annotated[float | None, Parameter(help="Megabytes of the exported model.", group=GOALS)] = None,
    trials: Annotated[int, Parameter(help="Runs in all.", group=GOALS), WHOLE] = 20,
    workers: Annotated[int, Parameter(help="Processes that run trials side by side.", group=GOALS), WHOLE] = 1,
    sampler: Annotated[str, Parameter(help="tpe, gp, random, or a bandit: ucb, thompson.", group=GOALS)] = "tpe",
    patience: Annotated[
        int, Parameter(help="Stop when so many trials brought nothing better.", group=GOALS), WHOLE
    ] = 10,
    flags: RecipeFlags = RecipeFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> None:
    """Search anchor and rate by running whole compressions and auditing each: the least loss that meets the goals.

    The records are split by a hash: one half serves the attacks of the search, the other the audit afterwards
    (OUT/final). Bandits choose among levels of the anchor. Needs optuna.

    For example:

      geoquant tune TUNED --base BASE --members in.jsonl --nonmembers out.jsonl --max-leak 0.3 --out TUNE
      geoquant tune TUNED --base BASE --members in.jsonl --nonmembers out.jsonl --sampler thompson --out TUNE2
    """
    with output(json) as result:
        wanted = flags.recipe(model, recipe)
        with progress_display() as progress:
            tuning = library("tuning", progress)
            goal = tuning.Goal(leak=max_leak, size=max_size)
            found = tuning.tune(
                wanted, out, goal, trials=trials, workers=workers, sampler=sampler, patience=patience, seed=wanted.seed
            )
        result(found, lambda: show(found))


def show(found: dict) -> None:
    """The best trial, and how to audit it."""
    best = found["best"]
    for name, value in best["values"].items():
        print(f"{name}: {value:.4g}")
    outcome = best["outcome"]
    print(f"loss: {outcome['loss']:.4f} nats per token; size: {outcome['size']:,.1f} MB")
    print(f"attack advantage: {outcome['leak']:.3f} on the records of the search")
    if not best["meets_the_goal"]:
        print("warning: no trial met the goal; this one missed it by least")
    print(f"trial {best['trial']} of {len(found['trials'])}: {best['run']}")
    final = found["final_audit"]
    print(
        "no formal guarantee; judge it on records that it was not tuned against: "
        f"geoquant audit {best['run']} --members {final['members']} --nonmembers {final['nonmembers']}"
    )

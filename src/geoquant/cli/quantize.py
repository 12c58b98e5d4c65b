"""`geoquant quantize`: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json, Model, RecipeFlags, command_line
from geoquant.cli.screen import library, output, progress_display
from geoquant.cli.summary import show_summary

if TYPE_CHECKING:
    from geoquant.recipe import Recipe

__all__ = ["quantize"]


def quantize(
    model: Model | None = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="New folder for the run: models, report, everything measured.")],
    resume: Annotated[bool, Parameter(help="Go on with the interrupted run in --out.", show_default=False)] = False,
    recipe: Annotated[Path | None, Parameter(help="TOML file with these options; flags win.")] = None,
    goal: Annotated[
        str | None, Parameter(help="small, balanced, private or certified: chooses options and says why.")
    ] = None,
    use: Annotated[
        str | None, Parameter(help="What for: general, medical, finance, support, code; weighs in --goal balanced.")
    ] = None,
    frontier: Annotated[
        Path | None, Parameter(help="Folder of a finished `geoquant frontier` of MODEL that --goal chooses from.")
    ] = None,
    flags: RecipeFlags = RecipeFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> None:
    """Compress a model, measure its quality and what it leaks, and write files that stock readers load.

    For example:

      geoquant quantize MODEL --out RUN --bits 4
      geoquant quantize MODEL --out RUN --bits 3 --method dqc --keep 0.01
      geoquant quantize MODEL --out RUN --members in.jsonl --nonmembers out.jsonl
      geoquant quantize MODEL --out RUN --goal private --frontier DIR --base BASE
      geoquant quantize MODEL --out RUN --plan PLAN.json --base BASE
      geoquant quantize --out RUN --resume

    The last one goes on after Ctrl-C, a crash or a full disk.
    """
    with output(json) as result:
        check_goal(model, goal, use, frontier)
        wanted = interrupted_recipe(out, flags) if unsaid(model, recipe, resume) else flags.recipe(model, recipe)
        with progress_display() as progress:
            pipeline, chosen = library("pipeline", progress), {}
            if goal is not None:
                aiming = library("aiming", progress)
                wanted, told = aiming.aimed(wanted, goal, use or "general", frontier, given=flags.given())
                progress("goal", 1, 1, told["why"])
                chosen = {"goal": told}
            report = pipeline.quantize(wanted, out, resume=resume, progress=progress, command=command_line(), **chosen)
        result(report, lambda: show_summary(report, out))


def check_goal(model: str | None, goal: str | None, use: str | None, frontier: Path | None) -> None:
    """Raise UserError for what serves a goal without one, and for a goal of nothing; before anything is imported."""
    from geoquant.errors import UserError, unknown_name
    from geoquant.plan.goals import GOALS

    if goal is None:
        if given := [name for name, value in (("--use", use), ("--frontier", frontier)) if value is not None]:
            raise UserError(f"{given[0]} serves a goal", wanted=f"--goal {', '.join(GOALS)}")
        return
    if goal not in GOALS:
        raise unknown_name("goal", goal, GOALS)
    if use is not None and frontier is None:
        raise UserError("--use weighs what a frontier measured", wanted="--frontier DIR", fix="or leave --use out")
    if model is None:
        raise UserError(
            "a goal chooses options for a new run", wanted="MODEL", fix="to go on with one, leave --goal out"
        )


def unsaid(model: str | None, recipe: Path | None, resume: bool) -> bool:
    """Whether the run folder itself must say what is wanted."""
    return resume and model is None and recipe is None


def interrupted_recipe(out: Path, flags: RecipeFlags) -> Recipe:
    """The recipe that the interrupted run in `out` wrote down, with the flags given now. Raises UserError."""
    from geoquant.errors import UserError
    from geoquant.recipe import overruled
    from geoquant.runs import recorded_recipe

    if not os.path.exists(out / "manifest.json"):  # not Path.exists(): it raises on a name that is too long
        raise UserError(f"nothing to resume in {out}", wanted="the folder of an interrupted run", fix="give a MODEL")
    return overruled(recorded_recipe(out), flags.given())

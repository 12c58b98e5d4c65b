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
    flags: RecipeFlags = RecipeFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> None:
    """Compress a model, measure its quality and what it leaks, and write files that stock readers load.

    For example:

      geoquant quantize MODEL --out RUN --bits 4
      geoquant quantize MODEL --out RUN --bits 3 --method dqc --keep 0.01
      geoquant quantize MODEL --out RUN --members in.jsonl --nonmembers out.jsonl
      geoquant quantize --out RUN --resume

    The last one goes on after Ctrl-C, a crash or a full disk.
    """
    with output(json) as result:
        wanted = interrupted_recipe(out, flags) if unsaid(model, recipe, resume) else flags.recipe(model, recipe)
        with progress_display() as progress:
            pipeline = library("pipeline", progress)
            report = pipeline.quantize(wanted, out, resume=resume, progress=progress, command=command_line())
        result(report, lambda: show_summary(report, out))


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

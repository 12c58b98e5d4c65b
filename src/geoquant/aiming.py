"""From a goal to the recipe of a run, and to what its report says of the choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from geoquant.errors import UserError
from geoquant.model.load import identity, locate
from geoquant.plan.goals import Choice, choose, default_choice
from geoquant.plan.points import INPUTS
from geoquant.recipe import Recipe, checked
from geoquant.runs import read_json

__all__ = ["aimed"]

DRAWN = ("name", "family", "pareto", "bits", "primary", "public", "domain")  # what a picture needs of a row


def aimed(
    recipe: Recipe, goal: str, use: str = "general", frontier: Path | None = None, *, given: Mapping = {}
) -> tuple[Recipe, dict]:
    """The recipe with the options that the goal comes to; and the `goal` entry of report.json.

    frontier: folder of a finished one of the same model; without it the goal's defaults. given: options that were asked
    for by name. Raises UserError where one of these is what the goal decides, and where the choice lacks an input.
    """
    if recipe.plan is not None:
        raise UserError(
            f"--goal {goal} chooses options, and a plan has chosen", got=f"--plan {recipe.plan}", fix="leave out one"
        )
    found = {"rows": [], "settings": {}} if frontier is None else _read(frontier, recipe, goal)
    rows, there = found["rows"], [name for name in INPUTS if getattr(recipe, name)]
    choice = choose(goal, rows, use) if rows else default_choice(goal, there)
    decided = {"grid": checked({"model": "model", **choice.recipe}).grid, **choice.recipe}
    for name, value in decided.items():
        if name in given and given[name] != value:
            raise UserError(
                f"--goal {goal} decides {name}: {value}", got=given[name], fix=f"leave out {name}, or --goal"
            )
    if absent := [name for name in choice.needs if getattr(recipe, name) is None]:
        raise UserError(
            f"--goal {goal} comes to {_named(choice)}", wanted=" and ".join(f"--{name}" for name in absent) + " as well"
        )
    told = {
        **{"goal": goal, "use": use if frontier else None, "point": choice.point, "why": choice.why},
        "frontier": frontier and str(frontier),
        "rows": [{name: row[name] for name in DRAWN} for row in rows],
    }
    return checked(_merged(recipe, choice, found["settings"])), told


def _merged(recipe: Recipe, choice: Choice, settings: Mapping) -> dict:
    """What was said, else as the frontier was measured; and the choice. Inputs that it does not need are left out, for
    a run refuses idle ones.
    """
    measured = {name: value for name, value in settings.items() if name in Recipe.model_fields}
    said = measured | {name: getattr(recipe, name) for name in recipe.model_fields_set}
    # The recipe fills these in by its grid, and the choice may take another.
    for name in ("grid", "method", "formats"):
        if name in said and said[name] == getattr(checked({"model": recipe.model, "grid": recipe.grid}), name):
            del said[name]
    idle = set(INPUTS) - set(choice.needs)
    return {name: value for name, value in said.items() if name not in idle} | dict(choice.recipe)


def _named(choice: Choice) -> str:
    options = ", ".join(f"{name} = {value}" for name, value in choice.recipe.items())
    return f"the point {choice.point!r}" if choice.point else options


def _read(folder: Path, recipe: Recipe, goal: str) -> dict:
    """A finished frontier of this model."""
    if not (folder / "frontier.json").exists():
        raise UserError(f"{folder} holds no frontier.json", fix="run geoquant frontier first")
    found = read_json(folder / "frontier.json", rows=list, hashes=dict, settings=dict)
    if found["hashes"].get("model") != identity(*locate(recipe.model)[:2]):
        raise UserError(f"{folder} is the frontier of another model than {recipe.model}", fix="measure this one first")
    if found.get("no_verdict") and goal in ("private", "balanced"):
        raise UserError(
            f"--goal {goal} weighs leakage, and the frontier's records allow no verdict on it: {found['no_verdict']}",
            fix="measure a frontier with other records",
        )
    return found

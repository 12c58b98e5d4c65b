"""What the user asked for, as one frozen value that is validated, saved beside the result and read back.

A recipe says nothing about *how* a step is done; it is the command line written down. TOML in and out.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from geoquant.errors import UserError, unknown_name

__all__ = ["Recipe", "checked", "load_recipe", "located", "recipe_toml"]

Format = Literal["compressed-tensors", "dense", "geoquant", "gguf", "gptq", "int4"]

# What only a box has; whoever names one of these without a grid wants the box.
BOXED = {"bits", "group_size", "symmetric", "keep", "static_scales"}
PACKED = {"compressed-tensors", "gguf", "gptq"}


class Recipe(BaseModel):
    """Everything that decides the numbers of a `quantize` run. Sizes in tokens, shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    # grid
    grid: Literal["box", "lattice"] = "lattice"
    rate: float = Field(default=3.25, ge=1.5, le=8.0)
    embeddings: bool = True
    foldable: bool = True
    method: str = "lattice-priced"
    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=64, ge=1)
    symmetric: bool = True
    keep: float = Field(default=0.0, ge=0.0, le=0.5)
    # metric and solver
    metric: str = "gradient"
    gradient_share: float = Field(default=0.25, gt=0.0, le=1.0)
    row_block: int = Field(default=64, ge=1, le=256)
    order: str = "group-aware"
    damping: float | None = Field(default=None, gt=0.0, le=1.0)
    static_scales: bool = False
    sequential: Literal["off", "block", "site"] = "site"
    target: Literal["weights", "outputs"] = "outputs"
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    moments: Literal["float32", "float64"] = "float32"
    # calibration: None means the text every Python carries
    calibration: str | None = None
    windows: int = Field(default=32, ge=1)
    window: int = Field(default=512, ge=8)
    # measuring
    evaluation: str | None = None
    evaluation_windows: int = Field(default=20, ge=1)
    members: str | None = None
    nonmembers: str | None = None
    canaries: str | None = None
    reference: str | None = None
    # files
    formats: tuple[Format, ...] = ("geoquant",)
    verify: bool = True
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"

    @property
    def follows_drift(self) -> bool:
        """Whether the target takes account of drifted inputs. Full-precision ones do not drift; and where stages do not
        see those before them in their block, each would make up for the same drift once more.
        """
        return self.target == "outputs" and self.sequential == "site"

    @model_validator(mode="before")
    @classmethod
    def _follow_the_grid(cls, values: dict) -> dict:
        """Without a grid the lattice, unless something of a box is asked for. Either has a method and a format."""
        grid = values["grid"] if "grid" in values else _grid_of(values)
        own = {"method": "babai", "formats": ("compressed-tensors",)} if grid == "box" else {}
        return {"grid": grid, **own, **values}


def _grid_of(values: Mapping) -> str:
    """The grid that fits what was asked for."""
    boxed = sorted(BOXED.intersection(values))
    if "rate" in values:
        if boxed:  # one that has its default's value would go unnoticed later
            raise UserError(
                "a rate belongs to the lattice and the others to the box",
                got=", ".join(f"{name} = {values[name]}" for name in ("rate", *boxed)),
                fix="leave out one or the others",
            )
        return "lattice"
    # Values of any type: what is wrong with them is said when they are validated.
    method, metric, formats = (values.get(name) for name in ("method", "metric", "formats"))
    packed = isinstance(formats, list | tuple) and any(name in formats for name in PACKED)  # of 2 to 8 bits
    alone = "method" in values and not str(method).startswith("lattice")
    boxed = boxed or alone or packed or ("metric" in values and metric != "gradient")
    return "box" if boxed else "lattice"


def located(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths, so that the run can go on from any folder.

    Hub ids, `demo` and files that are not there stay as they are.
    """
    texts = {name: getattr(recipe, name) for name in ("calibration", "evaluation", "members", "nonmembers", "canaries")}
    models = {name: value for name in ("model", "reference") if (value := getattr(recipe, name)) != "demo"}
    # Not resolve(): a link may point into a store whose file names say nothing (no .gguf, for one).
    return recipe.model_copy(
        update={name: os.path.abspath(path) for name, path in (texts | models).items() if path and os.path.exists(path)}
    )


def checked(values: dict) -> Recipe:
    """A validated recipe; the first violated constraint becomes the user's one line."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise _explained(error.errors()[0]) from None


def _explained(error: Mapping) -> UserError:
    """One violated constraint in the user's words: unknown names get a guess, numbers their range."""
    name, given = str(error["loc"][0]), error["input"]
    if error["type"] == "extra_forbidden":
        return unknown_name("option", name, Recipe.model_fields)
    if error["type"] == "literal_error":
        if name == "formats":
            return unknown_name("format", str(given), get_args(Format))
        return unknown_name(name, str(given), get_args(Recipe.model_fields[name].annotation))
    if error["type"] == "missing":
        return UserError("no model given", wanted="MODEL, or model = ... in the recipe", fix="for a first try: demo")
    return UserError(f"option {name}: {error['msg']}", got=repr(given), fix=_choice(name))


def _choice(name: str) -> str:
    """What may be chosen for an option: its range where it has one, and its default."""
    field = Recipe.model_fields[name]
    limits = {
        kind: getattr(part, kind) for part in field.metadata for kind in ("ge", "gt", "le") if hasattr(part, kind)
    }
    words = {"ge": "at least", "gt": "more than", "le": "at most"}
    span = " and ".join(f"{words[kind]} {limit:g}" for kind, limit in limits.items())
    if field.is_required():
        return "give a folder, a hub id or demo"
    default = "automatic" if field.default is None else repr(field.default)
    return f"choose a value of {span} (default {default})" if span else f"leave it out for the default, {default}"


def load_recipe(path: Path, **overrides: object) -> Recipe:
    """Read a TOML recipe; command-line options in `overrides` win."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe file {path}", fix="write one, or pass the options on the command line") from None
    except OSError as error:
        raise UserError(
            f"cannot read the recipe {path}: {error.strerror}", wanted="a .toml file", fix="give the file itself"
        ) from None
    except (ValueError, RecursionError) as error:  # tomllib passes on what Python says of a number of 5000 digits
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    return checked({**values, **overrides})


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML (None fields are left out: they mean the default)."""

    def literal(value: object) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return repr(value)
        if isinstance(value, list | tuple):
            return "[" + ", ".join(literal(item) for item in value) + "]"
        text = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"'

    return "".join(f"{key} = {literal(value)}\n" for key, value in recipe.model_dump().items() if value is not None)

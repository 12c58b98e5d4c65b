"""What the user asked for, as one frozen value that is validated, saved beside the result and read back.

A recipe says nothing about *how* a step is done; it is the command line written down. TOML in and out.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geoquant.errors import UserError

__all__ = ["Recipe", "load_recipe", "recipe_toml"]

Format = Literal["compressed-tensors", "dense"]


class Recipe(BaseModel):
    """Everything that decides the numbers of a `quantize` run. Sizes in tokens, shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    # grid
    method: str = "babai"
    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=64, ge=1)
    symmetric: bool = True
    keep: float = Field(default=0.0, ge=0.0, le=0.5)
    # metric and solver
    metric: str = "gradient"
    order: str = "group-aware"
    damping: float | None = Field(default=None, gt=0.0, le=1.0)
    static_scales: bool = False
    sequential: Literal["off", "block", "site"] = "site"
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
    formats: tuple[Format, ...] = ("compressed-tensors",)
    verify: bool = True
    seed: int = 0
    device: str = "cpu"


def checked(values: dict) -> Recipe:
    """A validated recipe; the first violated constraint becomes the user's one line."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise UserError(f"option {name}: {first['msg']}", got=repr(first.get("input"))) from None


def load_recipe(path: Path, **overrides: object) -> Recipe:
    """Read a TOML recipe; command-line options in `overrides` win."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe file {path}", fix="write one, or pass the options on the command line") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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

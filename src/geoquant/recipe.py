"""What the user asked for, as one frozen value that is validated, saved beside the result and read back.

A recipe says nothing about *how* a step is done; it is the command line written down. TOML in and out.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from geoquant.errors import UserError, unknown_name

__all__ = ["Recipe", "checked", "load_recipe", "located", "overruled", "recipe_toml", "refuse_idle"]

Format = Literal["compressed-tensors", "dense", "geoquant", "gguf", "gptq", "int4"]

# What only a box has; whoever names one of these without a grid wants the box. And what only the lattice has.
BOXED = {"bits", "group_size", "symmetric", "keep", "static_scales"}
RATED = {"rate"}
# What a plan file has decided (see planned.py).
PLANNED = {"rate", "anchor", "aim", "forget"}
PACKED = ("compressed-tensors", "gguf", "gptq")


class Recipe(BaseModel):
    """Everything that decides the numbers of a `quantize` run. Sizes in tokens, shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
    reference_share: float = Field(default=1.0, gt=0.0, le=1.0)
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    moments: Literal["float32", "float64"] = "float32"
    # a plan file: rates of stages, and what happens to the weights before (see planned.py)
    plan: str | None = None
    # what happens to the weights before anything is solved (see protecting.py)
    base: str | None = None
    private: str | None = None
    domain: str | None = None
    anchor: float = Field(default=0.0, ge=0.0, le=1.0)
    aim: Literal["everything", "memory", "metric"] = "everything"
    forget: int = Field(default=0, ge=0, le=1000)
    forget_weight: float = Field(default=10.0, gt=0.0, le=1e6)
    # a guarantee: parts of one claim (see privacy/guarantee/claim.py)
    epsilon: float | None = Field(default=None, gt=0.0)
    delta: float | None = Field(default=None, gt=0.0, lt=1.0)
    radius: float | None = Field(default=None, gt=0.0)
    ball: Literal["euclidean", "metric"] | None = None
    shards: tuple[str, ...] | None = None
    clip: float | None = Field(default=None, gt=0.0)
    inherited: str | None = None
    # and after it (see refining.py): passes, the weight of the private records, passes over each block before, and the
    # weight of the distortion of rows, with the threshold (None: a quantile) and by which share some rows have it lower
    refine: int = Field(default=0, ge=0, le=1000)
    refine_privacy: float = Field(default=1.0, ge=0.0, le=1000.0)
    refine_blocks: int = Field(default=0, ge=0, le=1000)
    refine_geometry: float = Field(default=0.0, ge=0.0, le=1e9)
    refine_threshold: float | None = Field(default=None, gt=0.0)
    refine_lowered: float = Field(default=0.25, ge=0.0, le=1.0)
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
    def _follow_the_grid(cls, values: object) -> object:
        """Without a grid the lattice, unless something of a box is asked for. Either has a method and a format."""
        if not isinstance(values, Mapping):
            return values  # pydantic says what is wrong with it
        grid = values["grid"] if "grid" in values else _grid_of(values)
        refuse_strangers({"grid": grid, **values})
        refuse_beside_plan({"grid": grid, **values})
        own = {"method": "babai", "formats": ("compressed-tensors",)} if grid == "box" else {}
        if values.get("private") and values.get("domain") and not values.get("plan"):
            own["aim"] = "memory"
        if values.get("base") and values.get("members"):
            own["reference"] = values["base"]
        return {"grid": grid, **own, **values}


def _grid_of(values: Mapping) -> str:
    """The grid that fits what was asked for."""
    boxed = sorted(BOXED.intersection(values))
    if "rate" in values:
        if boxed:  # one that has its default's value would go unnoticed later
            raise UserError(
                "a rate belongs to the lattice and the others to the box",
                got=_said(values, "rate", *boxed),
                fix="leave out one or the others",
            )
        if _packed(values) and all(name in PACKED for name in values["formats"]):
            raise _unfit(values["formats"][0], values["rate"])
        return "lattice"
    if boxed or _packed(values) or values.get("metric", "gradient") != "gradient":
        return "box"
    return "box" if "method" in values and not _of_lattice(values["method"]) else "lattice"


def _unfit(packed: str, rate: object) -> UserError:
    """A rate beside nothing but a format of fixed width: that its file would be larger is to be asked for."""
    near = next((bits for bits in range(2, 8) if isinstance(rate, int | float) and rate <= bits + 0.5), 8)
    return UserError(
        f"a rate belongs to the lattice, whose codes do not fit into a box of few bits: {packed} would hold them in 8",
        got=f"rate = {rate}, format = {packed}",
        fix=f"for codes of {near} bits in it use --bits {near} and no rate, or add --grid lattice if 8 bits are meant",
    )


def refuse_strangers(values: Mapping) -> None:
    """Raise UserError where something is asked for that `values["grid"]` has not: it would be ignored."""
    if values["grid"] == "lattice":
        if strangers := _asked(values, BOXED):
            raise UserError(
                f"{' and '.join(strangers)} belong{'s' if len(strangers) == 1 else ''} to the box",
                got=_said(values, "grid", *strangers),
                fix=f"leave {' and '.join(strangers)} out (the size of a lattice is --rate), or use --grid box",
            )
        if "method" in values and not _of_lattice(values["method"]):
            raise UserError(
                f"method {values['method']} needs a box",
                got=_said(values, "grid"),
                fix="leave --method out, or use --grid box",
            )
        if values.get("metric", "gradient") != "gradient":
            raise UserError(
                "the lattice weighs sites against each other by their gradients",
                got=f"--metric {values['metric']}",
                fix="use --metric gradient, or --grid box",
            )
    if values["grid"] == "box":
        if _asked(values, RATED):
            raise UserError(
                "a box has bits, not a rate", got=_said(values, "grid", "rate"), fix="use --grid lattice, or --bits"
            )
        if _of_lattice(values.get("method")):
            reasons = _asked(values, BOXED | {"metric"}) + (["formats"] if _packed(values) else [])
            out = [f"leave {name} out" for name in reasons if name != "formats"]
            raise UserError(
                f"method {values['method']} has no box",
                got=_said(values, *(reasons or ["grid"])),
                fix=" and ".join([*out, "use --grid lattice"]) + ", or leave --method out",
            )


def refuse_idle(recipe: Recipe, flags: Mapping) -> None:
    """Raise UserError for a flag that nothing in this recipe reads: it would be ignored."""
    lattice, rounded = recipe.grid == "lattice", recipe.method in ("rtn", "lattice-rtn")
    for names, read, what, by in (
        (("embeddings", "foldable"), lattice, "--grid lattice", ("grid",)),
        (("row_block",), lattice or recipe.row_block == 1, "--grid lattice", ("grid",)),
        (("gradient_share",), recipe.metric not in ("plain", "clipped"), "--metric gradient", ("metric",)),
        (
            ("reference_share",),
            recipe.follows_drift,
            "--target outputs with --sequential site",
            ("target", "sequential"),
        ),
        (("order",), not rounded, "methods that make up for one column in the next", ("method",)),
    ):
        if not read and (given := [name for name in names if name in flags]):
            flag = f"--{'no-' * (flags[given[0]] is False)}{given[0].replace('_', '-')}"
            raise UserError(f"{flag} serves {what}", got=_said(recipe.model_dump(), *by), fix=f"leave {flag} out")


def refuse_beside_plan(values: Mapping) -> None:
    """Raise UserError where something is asked for that a plan file has decided, or a grid that it is not for."""
    if values.get("plan") is None:
        return
    if clash := _asked(values, PLANNED):
        raise UserError(
            "a plan has decided what every stage's rate is and how far its weights go back",
            got=_said(values, "plan", *clash),
            fix=f"leave out {' and '.join(clash)}, or the plan",
        )
    if values["grid"] == "box":
        reasons = _asked(values, BOXED) + (["formats"] if _packed(values) else [])
        raise UserError(
            "a plan has rates, and a box has bits",
            got=_said(values, *(reasons or ["grid"])),
            fix=f"leave out {' and '.join(reasons or ['grid'])}, or the plan",
        )


def _asked(values: Mapping, names: set[str]) -> list[str]:
    """Which of the options were asked for. A recipe that was written down whole names them all: there those that do not
    have their default.
    """
    changed = {name for name in names.intersection(values) if values[name] != Recipe.model_fields[name].default}
    whole = values.keys() >= BOXED | RATED
    return sorted(changed if whole else changed | (names - {"metric"}).intersection(values))


# Values of any type: what is wrong with them is said when they are validated.
def _of_lattice(method: object) -> bool:
    return str(method).startswith("lattice")


def _packed(values: Mapping) -> bool:
    """Whether a format of 2 to 8 bits is asked for."""
    formats = values.get("formats")
    return isinstance(formats, list | tuple) and any(name in formats for name in PACKED)


def _said(values: Mapping, *names: str) -> str:
    return ", ".join(f"{name} = {values[name]}" for name in names)


def located(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths, so that the run can go on from any folder.

    Hub ids, `demo` and files that are not there stay as they are.
    """
    names = ("calibration", "evaluation", "members", "nonmembers", "canaries", "private", "domain", "inherited", "plan")
    texts = {name: getattr(recipe, name) for name in names}
    models = {name: value for name in ("model", "reference", "base") if (value := getattr(recipe, name)) != "demo"}
    # Not resolve(): a link may point into a store whose file names say nothing (no .gguf, for one).
    return recipe.model_copy(
        update={name: os.path.abspath(path) for name, path in (texts | models).items() if path and os.path.exists(path)}
        | {"shards": recipe.shards and tuple(os.path.abspath(p) if os.path.exists(p) else p for p in recipe.shards)}
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
    return overruled(values, overrides)


def overruled(written: Mapping, flags: Mapping) -> Recipe:
    """The recipe that was written down, overruled by flags. Of these all were asked for, whatever their value."""
    values = {**written, **flags}
    if "grid" in values:
        refuse_strangers({"grid": values["grid"], **flags})
        refuse_beside_plan({"grid": values["grid"], "plan": values.get("plan"), **flags})
    return checked(values)


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML (None fields are left out: they mean the default)."""

    def literal(value: object) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return repr(value)
        if isinstance(value, list | tuple):
            return "[" + ", ".join(literal(item) for item in value) + "]"
        # JSON's strings are TOML's, but for one character that JSON leaves as it is.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")

    return "".join(f"{key} = {literal(value)}\n" for key, value in recipe.model_dump().items() if value is not None)

"""Operating points: what a frontier measures, each a name and what it changes in the recipe that all of them share.

A file of points is TOML, one table a point:

    ["lattice, half the way back"]
    rate = 3.25                # any option of a recipe but those that all points share
    anchor = 0.5
    needs = ["base"]           # of the inputs base, private and domain; with an anchor, base if nothing is said

    [full]
    noise = 0.25               # before anything else: Gaussian, in steps of a 4-bit grid; linear layers
    quantize = false           # measured as it is
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geoquant.errors import UserError, unknown_name
from geoquant.recipe import Recipe, checked

__all__ = ["FAMILIES", "INPUTS", "ORIGINAL", "SHARED", "Change", "Point", "check_names", "fitting", "read_points"]

ORIGINAL = "original"
# What every point of one frontier has in common: without it no two of them could be compared.
SHARED = {
    *("model", "members", "nonmembers", "canaries", "reference", "base", "private", "domain"),
    *("evaluation", "evaluation_windows", "window", "formats", "verify", "seed", "device"),
}
FAMILIES = {
    "original": "the model as it came",
    "rounding": "rounding in boxes",
    "lattice": "the lattice alone",
    "interpolation": "a share of the way back to the public base, everywhere",
    "noise": "the same noise everywhere",
    "anchor": "anchored to the public base where it matters",
    "shape": "other levers alone",
    "guarantee": "a release under a formal guarantee",
    "together": "several levers",
    "dp": "trained with DP-SGD",
    "own": "points of your own",
}
INPUTS = ("base", "private", "domain")
OWN_KEYS = ("family", "interpolate", "needs", "noise", "quantize")
NAME = re.compile(r"[\w.+,%=() -]{1,80}")


@dataclass(frozen=True)
class Change:
    """What is done to the weights before anything is solved; the baselines that are no recipe.

    interpolate: base + amount * (model - base), every tensor, amount in [0, 1]. noise: independent Gaussian noise on
    every linear layer, of `amount` times the step that the weight's group of 64 columns has on a symmetric 4-bit grid;
    embeddings, norms and biases stay.
    """

    kind: str
    amount: float

    @property
    def words(self) -> str:
        if self.kind == "interpolate":
            return f"{self.amount:g} of the change from the base, all tensors"
        return f"noise of {self.amount:g} four-bit steps on linear layers"


@dataclass(frozen=True)
class Point:
    """One row of the control matrix.

    recipe: what it sets beyond the recipe that all points share. quantize: False where the model is measured as it is.
    needs: inputs without which it cannot be made. model, statement: another model than the frontier's, and what its
    trainer claims.
    """

    name: str
    family: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    change: Change | None = None
    quantize: bool = True
    needs: tuple[str, ...] = ()
    model: str | None = None
    statement: str | None = None

    @property
    def words(self) -> str:
        """What it is, and its options."""
        options = [f"{name} = {value}" for name, value in self.recipe.items()]
        return ", ".join([FAMILIES[self.family], *([self.change.words] if self.change else []), *options])


def fitting(
    points: Sequence[Point], given: Collection[str], known: Collection[str] = tuple(Recipe.model_fields)
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """The points that can be made, and a line on each kind of those that cannot.

    given: inputs that are there ("base", "private"...). known: options that this version has.
    """
    kept, left = [], {}
    for point in points:
        if (why := _obstacle(point, given, known)) is None:
            kept.append(point)
        else:
            left.setdefault(why, []).append(point.name)
    return tuple(kept), tuple(f"left out: {'; '.join(names)} ({why})" for why, names in left.items())


def _obstacle(point: Point, given: Collection[str], known: Collection[str]) -> str | None:
    """Why a point cannot be made, or None."""
    if strange := [name for name in point.recipe if name not in known]:
        return f"this version has no option {' or '.join(strange)}"
    if absent := [name for name in point.needs if name not in given]:
        return f"they need {' and '.join(f'--{name}' for name in absent)}"
    try:
        checked({"model": "model", **point.recipe})
    except UserError as error:  # a choice that this version does not offer
        return str(error)
    return None


def read_points(path: Path) -> tuple[Point, ...]:
    """The points of a TOML file, after the original, which is always one. Raises UserError for what is wrong there."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file of points {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", wanted="a .toml file of points") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    if not tables:
        raise UserError(f"{path} holds no points", wanted='a table for each, such as ["lattice 3.25"] and rate = 3.25')
    return Point(ORIGINAL, "original", quantize=False), *(_point(path, name, table) for name, table in tables.items())


def _needs(options: Mapping, change: Change | None) -> list[str]:
    """Inputs that a point takes if it does not say which."""
    if options.get("aim", "everything") != "everything":
        return list(INPUTS)
    base = any(options.get(name) for name in ("anchor", "radius", "plan")) or (change and change.kind == "interpolate")
    return ["base"] if base else []


def _point(path: Path, name: str, table: object) -> Point:
    where = f"{path}, point {name!r}"
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name!r} is not a point", wanted=f"a table [{name}] with its options")
    if not NAME.fullmatch(name) or name.strip(" .") != name:
        raise UserError(f"{where}: a name becomes a folder", wanted="letters, digits, spaces and . , + - = % ( )")
    if name == ORIGINAL:
        raise UserError(f"{where}: this name is taken; the original is always measured", fix="leave it out")
    options = {key: value for key, value in table.items() if key not in OWN_KEYS}
    if shared := SHARED.intersection(options):
        raise UserError(f"{where} sets {min(shared)}, which all points share", fix="give it on the command line")
    for key in options:
        if key not in Recipe.model_fields:
            raise _at(where, unknown_name("option", key, (Recipe.model_fields.keys() - SHARED) | set(OWN_KEYS)))
    family = table.get("family", "own")
    if family not in FAMILIES:
        raise _at(where, unknown_name("family", str(family), FAMILIES))
    quantize = table.get("quantize", True)
    if not isinstance(quantize, bool):
        raise UserError(f"{where}: quantize", got=repr(quantize), wanted="true or false")
    change = _change(where, table)
    if not quantize and (options or change is None):
        raise UserError(
            f"{where} is not quantized", got=", ".join(options) or "nothing to do", wanted="interpolate or noise alone"
        )
    try:
        checked({"model": "model", **options})
    except UserError as error:
        raise _at(where, error) from None
    needs = table.get("needs", _needs(options, change))
    if not isinstance(needs, list) or not set(needs) <= set(INPUTS):
        raise UserError(f"{where}: needs", got=repr(needs), wanted=f"a list of {', '.join(INPUTS)}")
    return Point(name, family, options, change, quantize, tuple(needs))


def _change(where: str, table: Mapping) -> Change | None:
    """What is done to the weights first."""
    asked = [kind for kind in ("interpolate", "noise") if kind in table]
    if len(asked) > 1:
        raise UserError(f"{where}: interpolate and noise", wanted="one of them")
    if not asked:
        return None
    amount, most = table[asked[0]], 1.0 if asked[0] == "interpolate" else 100.0
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount <= most:
        raise UserError(f"{where}: {asked[0]}", got=repr(amount), wanted=f"a number from 0 to {most:g}")
    return Change(asked[0], float(amount))


def _at(where: str, error: UserError) -> UserError:
    return UserError(f"{where}: {error}")


def check_names(points: Iterable[Point]) -> None:
    """Raise UserError where two points share a name, in whatever case: their folders would be one."""
    seen: set[str] = set()
    for point in points:
        if point.name.lower() in seen:
            raise UserError(f"two points are called {point.name!r}", fix="rename one")
        seen.add(point.name.lower())

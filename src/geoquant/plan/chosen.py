"""The plan file: what a choice for the whole model decided, for `quantize` to read.

    {"schema": 1, "sha256": {"model": ..., "base": ... or null, "effects": ...},
     "objective": {quantity: weight}, "budgets": {quantity: largest}, "totals": {...}, "prices": {...},
     "units": [{"name", "stage", "parameters": [...], "share", "bits"}]}

share: of the change from the public base that survives, 1 as it is and 0 the base itself; every parameter of the unit.
bits: per weight, of the stage that is solved as one; null where nothing is rounded. Quantities are those of
plan/effects.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from geoquant.errors import UserError
from geoquant.plan.allocate import Allocation
from geoquant.plan.effects import Effects
from geoquant.runs import read_json, write_json

__all__ = ["Chosen", "ChosenUnit", "choice", "read_plan"]

SCHEMA = 1
AGAIN = "run geoquant plan again"


@dataclass(frozen=True)
class ChosenUnit:
    """One unit's part of the plan file."""

    name: str
    stage: str | None
    parameters: tuple[str, ...]
    share: float
    bits: float | None


@dataclass(frozen=True)
class Chosen:
    """A plan file. sha256: of `model`, `base` (None: no weight goes back) and `effects`, the table it was chosen by."""

    sha256: Mapping[str, str | None]
    objective: Mapping[str, float]
    budgets: Mapping[str, float]
    totals: Mapping[str, float]
    prices: Mapping[str, float]
    units: tuple[ChosenUnit, ...]

    @property
    def shares(self) -> dict[str, float]:
        """By parameter, the share of its change from the base that survives."""
        return {name: unit.share for unit in self.units for name in unit.parameters}

    @property
    def bits(self) -> dict[str, float]:
        """By stage, bits per weight."""
        return {unit.stage: unit.bits for unit in self.units if unit.stage is not None and unit.bits is not None}

    @property
    def looked(self) -> bool:
        """Whether private records had a say in it: in what was to be small, or in a budget."""
        return any(name in ("leak", "domain") for name in (*self.objective, *self.budgets))

    @property
    def anchors(self) -> bool:
        """Whether any weight goes back towards the base."""
        return any(unit.share < 1 for unit in self.units)

    def write(self, path: Path) -> None:
        """Atomically."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    def check(self, model_sha256: str, base_sha256: str | None = None) -> None:
        """Raise UserError where the plan was made for another model, or goes back to another base."""
        if model_sha256 != self.sha256["model"]:
            raise UserError("the plan was made for another model", fix="run geoquant plan on this one")
        if self.anchors and base_sha256 != self.sha256["base"]:
            got = "no base" if base_sha256 is None else "another one"
            raise UserError("the plan goes back towards a public base", got=got, wanted="--base as it was planned with")


def choice(
    allocation: Allocation, effects: Effects, objective: Mapping[str, float], budgets: Mapping[str, float]
) -> Chosen:
    """The plan file of an allocation over `options(effects)`."""
    hashes = {name: effects.measured.get(name) for name in ("model", "base")}
    return Chosen(
        sha256={**hashes, "effects": effects.sha256},
        objective=dict(objective),
        budgets=dict(budgets),
        totals=allocation.totals,
        prices=allocation.prices,
        units=tuple(
            ChosenUnit(unit.name, unit.stage, unit.parameters, labels["share"], labels["bits"])
            for unit in effects.units
            for labels in (allocation.chosen[unit.name].labels,)
        ),
    )


def read_plan(path: Path) -> Chosen:
    """What `Chosen.write` wrote. Raises UserError for anything else, and for shares and bits that cannot be."""
    if not os.path.isfile(path):  # not Path.is_file(): it raises on a name that is too long
        raise UserError(f"no plan file {path}", fix="make one: geoquant plan MODEL --max-size MB --out PLAN.json")
    parts = dict.fromkeys(("sha256", "objective", "budgets", "totals", "prices"), dict)
    told = read_json(path, mend=AGAIN, schema=int, units=list, **parts)
    if told["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {told['schema']}", wanted=f"{SCHEMA}", fix=AGAIN)
    units = []
    for number, one in enumerate(told["units"]):
        try:
            unit = ChosenUnit(**{**one, "parameters": tuple(one["parameters"])})
            names = (unit.name, *unit.parameters, *([] if unit.stage is None else [unit.stage]))
            good = 0 <= unit.share <= 1 and (unit.bits is None or 0 < unit.bits <= 16)
            good = good and all(isinstance(name, str) for name in names)
        except (TypeError, KeyError):
            good = False
        if not good:
            raise UserError(
                f"{path}: unit {number} is none", wanted="name, stage, parameters, share in [0, 1] and bits up to 16"
            )
        units.append(unit)
    seen = [name for unit in units for name in unit.parameters]
    stages = [unit.stage for unit in units if unit.stage is not None]
    twice = len(set(seen)) < len(seen) or len(set(stages)) < len(stages)
    if twice or {"model", "base", "effects"} - told["sha256"].keys():
        raise UserError(f"{path} is damaged: a parameter twice, or a hash missing", fix=AGAIN)
    rest = {name: told[name] for name in ("sha256", "objective", "budgets", "totals", "prices")}
    return Chosen(units=tuple(units), **rest)

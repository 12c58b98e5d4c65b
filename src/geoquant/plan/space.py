"""Where a search looks: fields of a recipe, each with its range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geoquant.errors import UserError, unknown_name
from geoquant.recipe import Recipe

__all__ = ["SPACE", "Dimension", "check_space", "probes"]


@dataclass(frozen=True)
class Dimension:
    """A recipe field and where to look for its value. levels: the list that bandits choose from."""

    field: str
    low: float
    high: float
    log: bool = False
    levels: int = 5

    def grid(self) -> tuple[float, ...]:
        """Evenly spaced, in the logarithm if `log`."""
        space = np.geomspace if self.log else np.linspace
        return tuple(float(round(value, 6)) for value in space(self.low, self.high, self.levels))


SPACE = (Dimension("anchor", 0.0, 0.9), Dimension("rate", 2.25, 4.5))


def check_space(space: Sequence[Dimension]) -> None:
    """Raise UserError for a field that a recipe has not, one that is there twice, and values that are no range."""
    if not space:
        raise UserError("a search moves something", got="no recipe field")
    for one in space:
        if one.field not in Recipe.model_fields:
            raise unknown_name("recipe field", one.field, Recipe.model_fields)
        there = math.isfinite(one.low) and math.isfinite(one.high) and one.low < one.high
        if not there or one.levels < 2 or (one.log and one.low <= 0):
            wanted = "low < high, at least 2 levels, and with log low > 0"
            raise UserError(f"the search cannot move {one.field}", got=one, wanted=wanted)
    fields = [one.field for one in space]
    if twice := [name for name in fields if fields.count(name) > 1]:
        raise UserError(f"the search moves {twice[0]} twice", fix="name it once")


def probes(space: Sequence[Dimension], *, levels: bool) -> list[dict[str, float]]:
    """Values that show whether a recipe takes what a search may try, the largest last.

    levels: those of the first dimension, as bandits try them; else the ends and, of every dimension, a value between
    them that is no whole number.
    """
    if levels:
        return [{space[0].field: value} for value in space[0].grid()]
    between = {one.field: one.low + (one.high - one.low) / math.e for one in space}
    return [between, {one.field: one.low for one in space}, {one.field: one.high for one in space}]

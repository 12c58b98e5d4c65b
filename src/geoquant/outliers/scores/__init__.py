"""The scores, one file each: whoever adds a file with `SCORES` in it adds its scores."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from geoquant.outliers.score import Score

__all__ = ["SCORES"]

SCORES: dict[str, Score] = {
    score.name: score
    for module in iter_modules(__path__)
    for score in import_module(f"{__name__}.{module.name}").SCORES
}

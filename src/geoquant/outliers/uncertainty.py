"""Standard errors of many scores at one site, in one go over the parts of all texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score
from geoquant.outliers.statistics import Statistics, left_out

__all__ = ["standard_errors"]


def standard_errors(
    scores: Sequence[Score],
    context: SiteContext,
    parts: Mapping[str, Sequence[Statistics]],
    read: Callable[[Score, Tensor], Tensor] = lambda _, values: values,
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """By name, the standard error of `read(score, score.compute(context))`.

    parts: of each text (`public`, `private`, `domain`), the statistics that add up to its own; of about one size,
           and independent of one another. Texts are independent, so the squares of what each leaves open add. A text
           that is not named counts as known without error.
    read:  what is made of a score's numbers before it is judged (`score.columns`, say).
    values: by name, `read(score, score.compute(context))` where that is known already.

    A score that no such text enters has no error (zero): what its rows leave open is its own to say (`Score.error`).
    NaN where a text has one part only. Scores that need what the context lacks are left out.
    """
    used = [score for score in scores if context.has(score.needs)]
    if values is None:
        values = {score.name: read(score, score.compute(context)) for score in used}
    variances = {score.name: torch.zeros_like(values[score.name]) for score in used}
    for text, own in parts.items():
        touched = [score for score in used if text in score.texts]
        if len(own) < 2:
            for score in touched:
                variances[score.name] += torch.nan
            continue
        spreads = {score.name: _Spread() for score in touched}
        for rest in _without_one(context, text, own):
            for score in touched:
                spreads[score.name].add(read(score, score.compute(rest)))
        for name, spread in spreads.items():
            variances[name] += spread.squares * (len(own) - 1) / len(own)
    return {name: variance.sqrt() for name, variance in variances.items()}


def _without_one(context: SiteContext, text: str, parts: Sequence[Statistics]) -> Iterator[SiteContext]:
    for index, rest in enumerate(left_out(parts)):
        changed = replace(context, **{text: rest})
        for name in (f"{text}_gradients", f"{text}_metrics"):
            own = getattr(context, name, None)
            if own is not None:
                if len(own) != len(parts):
                    raise ValueError(f"{name}: one per part of {text} text, but got {len(own)}, wanted {len(parts)}")
                changed = replace(changed, **{name: torch.cat([own[:index], own[index + 1 :]])})
        yield changed


class _Spread:
    """Sum of squared distances from the mean, one value at a time (Welford 1962): K matrices need no memory of K."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, None, None

    def add(self, value: Tensor) -> None:
        self.count += 1
        if self.mean is None:
            self.mean, self.squares = value.clone(), torch.zeros_like(value)
            return
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (value - self.mean)

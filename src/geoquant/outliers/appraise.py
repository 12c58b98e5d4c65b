"""Scores of the sites of one block, each with its standard error and its null."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.lattice.grid import Grid
from geoquant.methods import rtn
from geoquant.methods.problem import Problem
from geoquant.model.walk import Site
from geoquant.outliers import score as reading
from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.score import Score
from geoquant.outliers.statistics import Statistics, summarise, total

__all__ = ["Appraisal", "Collected", "appraise"]


@dataclass
class Collected:
    """Statistics of one block under way: by site and text, one for each of the `parts` that a text is cut into.

    A batch belongs whole to one part, neighbours to different ones, so that parts are alike and independent.
    """

    parts: int
    sums: dict[tuple[str, str], dict[int, Statistics]] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)

    def see(
        self, text: str, batch: int, site: str, x: Float[Tensor, "tokens in"], g: Float[Tensor, "tokens out"]
    ) -> None:
        """Add what a batch does at a site."""
        unit = self.units.setdefault(site, x.square().mean().sqrt().clamp_min(1e-30).item())
        found = self.sums.setdefault((site, text), {})
        part, new = batch % self.parts, summarise(x, g, unit)
        found[part] = found[part] + new if part in found else new

    def of(self, site: str, text: str) -> list[Statistics]:
        """The parts of one text at one site; none if it was not observed."""
        return list(self.sums.get((site, text), {}).values())

    def clear(self) -> None:
        """Forget everything: the next block comes."""
        self.sums.clear()
        self.units.clear()


@dataclass(frozen=True)
class Appraisal:
    """One score at one site.

    site, error, null: of the whole site, its standard error (NaN where a text has one part), and the same score where
    nothing is to be found. columns, rows, groups: the score's readings, None where it has none; part_errors: standard
    errors of the columns (of the rows, if there are no columns).
    """

    score: Score
    site: float
    error: float
    null: float
    columns: Float[Tensor, " in"] | None
    rows: Float[Tensor, " out"] | None
    groups: Tensor | None
    part_errors: Tensor | None


def appraise(
    site: Site,
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"] | None,
    texts: dict[str, list[Statistics]],
    scores: Iterable[Score],
    *,
    bits: int = 3,
    seed: int = 0,
) -> list[Appraisal]:
    """Every score that the texts allow. texts: `public`, and perhaps `private` and `domain`, each in parts.

    bits: of the plain rounding (symmetric, groups of 64) whose error scores weigh.
    """
    delta = rounded(weight, bits) - weight
    whole = {name: total(parts) for name, parts in texts.items() if parts}
    context = SiteContext(site.name, site.kind, weight, delta, base=base, **whole)
    # Every text lacks its k-th part in turn, all at once: their parts are as independent as a text's own.
    count = min(len(parts) for parts in texts.values() if parts)
    left = [
        replace(context, **{name: whole[name] - parts[k] for name, parts in texts.items() if parts})
        for k in range(count if count > 1 else 0)
    ]
    empty = null_context(context, torch.Generator().manual_seed(seed))
    return [_one(score, context, left, empty) for score in scores if context.has(score.needs)]


def rounded(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """The nearest symmetric codes of groups of 64, every column as important as any other."""
    metric = torch.eye(weight.shape[1], device=weight.device)
    return rtn.solve(Problem(weight, metric, grid=Grid(bits=bits))).dequantize()


def _one(score: Score, context: SiteContext, left: list[SiteContext], empty: SiteContext) -> Appraisal:
    values = score.compute(context)
    columns, rows = reading.columns(score, values), reading.rows(score, values)
    finest = columns if columns is not None else rows
    others = [score.compute(other) for other in left]
    part_errors = None
    if others and finest is not None:
        read = reading.columns if columns is not None else reading.rows
        part_errors = _spread(torch.stack([read(score, other) for other in others]))
    sites = torch.stack([reading.site(score, other) for other in others]) if others else torch.tensor([torch.nan])
    return Appraisal(
        score,
        reading.site(score, values).item(),
        _spread(sites).item() if others else float("nan"),
        reading.site(score, score.compute(empty)).item(),
        columns,
        rows,
        reading.groups(score, values),
        part_errors,
    )


def _spread(left: Float[Tensor, "k ..."]) -> Tensor:
    """Jackknife standard error of k values, each without one part (see statistics.jackknife)."""
    count = len(left)
    return ((left - left.mean(0)).square().sum(0) * (count - 1) / count).sqrt()

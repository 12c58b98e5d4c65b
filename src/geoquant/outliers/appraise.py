"""Scores of the sites of one block, each with its standard error and its null."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.model.walk import Site
from geoquant.outliers import score as reading
from geoquant.outliers.context import SiteContext
from geoquant.outliers.interventions import rounded
from geoquant.outliers.score import Score
from geoquant.outliers.statistics import Statistics, metrics, nothing_of, summarise, total
from geoquant.outliers.uncertainty import standard_errors

__all__ = ["BEYOND", "DRAWS", "Appraisal", "Collected", "appraise", "site_context"]

DRAWS = 4  # of a null: each costs about as much as the scores themselves
BEYOND = 0.01


@dataclass
class Collected:
    """Statistics of one block under way: by site and text, one for each of the `parts` that a text is cut into.

    A batch belongs whole to one part, neighbours to different ones, so that parts are alike and independent.
    """

    parts: int
    sums: dict[tuple[str, str], dict[int, Statistics]] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    last: tuple[Tensor, Statistics] | None = None

    def see(
        self, text: str, batch: int, site: str, x: Float[Tensor, "tokens in"], g: Float[Tensor, "tokens out"]
    ) -> None:
        """Add what a batch does at a site. Sites that read the same inputs come in a row, with the very same x."""
        unit = self.units.setdefault(site, x.square().mean().sqrt().clamp_min(1e-30).item())
        found = self.sums.setdefault((site, text), {})
        like = self.last[1] if self.last is not None and self.last[0] is x else None
        part, new = batch % self.parts, summarise(x, g, unit, like)
        self.last = x, new
        found[part] = found[part] + new if part in found else new

    def of(self, site: str, text: str) -> list[Statistics]:
        """The parts of one text at one site; none if it was not observed.

        A part of the text whose tokens all went elsewhere (to other experts) counts with zeros: it is as much of the
        text as the others.
        """
        found = self.sums.get((site, text), {})
        if not found:
            return []
        nothing = nothing_of(next(iter(found.values())))
        parts = sorted(set().union(*(own for (_, other), own in self.sums.items() if other == text)))
        return [found.get(part, nothing) for part in parts]

    def clear(self) -> None:
        """Forget everything: the next block comes."""
        self.sums.clear()
        self.units.clear()
        self.last = None


@dataclass(frozen=True)
class Appraisal:
    """One score at one site.

    site, error: of the whole site, and its standard error (NaN where a text has one part). null, null_spread: mean and
    standard deviation of the same score over draws where nothing is to be found. columns, rows, groups: the score's
    readings, None where it has none; part_errors: standard errors of the columns (of the rows, if there are no
    columns). beyond: how many of these are above all but 1% of the null's, of all draws together; None without any. By
    chance 1% are, and more where the null leaves out what chance does (`context.null_context` says where).
    """

    score: Score
    site: float
    error: float
    null: float
    null_spread: float
    beyond: int | None
    columns: Float[Tensor, " in"] | None
    rows: Float[Tensor, " out"] | None
    groups: Tensor | None
    part_errors: Tensor | None


def site_context(
    site: Site,
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"] | None,
    texts: dict[str, list[Statistics]],
    *,
    bits: int = 3,
) -> SiteContext:
    """What scores are given of a site. texts: `public`, and perhaps `private` and `domain`, each in parts.

    bits: of the plain rounding (symmetric, groups of 64) whose error scores weigh.
    """
    given = {name: parts for name, parts in texts.items() if parts}
    return SiteContext(
        site.name,
        site.kind,
        weight,
        rounded(weight, bits) - weight,
        base=base,
        public_metrics=metrics(given["public"]),
        **{name: total(parts) for name, parts in given.items()},
        **{f"{name}_gradients": torch.stack([part.gradient for part in parts]) for name, parts in given.items()},
    )


def appraise(
    context: SiteContext, texts: dict[str, list[Statistics]], scores: Iterable[Score], *, seed: int = 0
) -> list[Appraisal]:
    """Every score that the texts allow. texts: the parts that the context's statistics are made of."""
    given = {name: parts for name, parts in texts.items() if parts}
    used = [score for score in scores if context.has(score.needs)]
    nulls = _nulls(used, context, seed)
    found = [_one(score, context, nulls[score.name]) for score in used]
    errors = standard_errors(used, context, given, _read, {one.score.name: _known(one) for one in found})
    errors |= {score.name: score.error(context) for score in used if score.error is not None}
    return [_judged(one, errors[one.score.name]) for one in found]


def _nulls(scores: Sequence[Score], context: SiteContext, seed: int) -> dict[str, Float[Tensor, "draws 1+n"]]:
    """By name, what `_read` gives on each draw of the score's null; scores of one null see the same draws."""
    found: dict[str, list[Tensor]] = {score.name: [] for score in scores}
    for draw in dict.fromkeys(score.null for score in scores):
        own = [score for score in scores if score.null is draw]
        for empty in draw(context, torch.Generator().manual_seed(seed), DRAWS):
            for score in own:
                found[score.name].append(_read(score, score.compute(empty)))
    return {name: torch.stack(values) for name, values in found.items()}


def _one(score: Score, context: SiteContext, null: Float[Tensor, "draws 1+n"]) -> Appraisal:
    values = score.compute(context)
    whole = null[:, 0].double()
    finest = _read(score, values)[1:]
    return Appraisal(
        score,
        site=reading.site(score, values).item(),
        error=math.nan,
        null=whole.mean().item(),
        null_spread=0.0 if score.same else whole.std().item(),  # or the rounding of a sum in another order
        beyond=int((finest > _high(null[:, 1:])).sum()) if len(finest) else None,
        columns=reading.columns(score, values),
        rows=reading.rows(score, values),
        groups=reading.groups(score, values),
        part_errors=None,
    )


def _high(values: Float[Tensor, "draws n"]) -> Tensor:
    """The value that all but `BEYOND` of them do not exceed."""
    return values.flatten().kthvalue(max(1, math.ceil((1 - BEYOND) * values.numel()))).values


def _judged(one: Appraisal, errors: Float[Tensor, " 1+n"]) -> Appraisal:
    return replace(one, error=errors[0].item(), part_errors=errors[1:] if len(errors) > 1 else None)


def _read(score: Score, values: Tensor) -> Float[Tensor, " 1+n"]:
    """The whole site, then its columns, or its rows where a score knows no columns."""
    finest = reading.columns(score, values)
    finest = reading.rows(score, values) if finest is None else finest
    whole = reading.site(score, values).reshape(1)
    return whole if finest is None else torch.cat([whole, finest])


def _known(one: Appraisal) -> Float[Tensor, " 1+n"]:
    """What `_read` gives, from what has been read."""
    finest = one.rows if one.columns is None else one.columns
    whole = torch.tensor([one.site])
    return whole if finest is None else torch.cat([whole.to(finest), finest])

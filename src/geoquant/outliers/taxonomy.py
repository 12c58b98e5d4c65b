"""What a group of weights is, by what an intervention on it did: functional, sensitive, both or neither.

    functional   the NLL of public text rises by more than max(tau, 2 SE), tau = ln(1 + 0.3 / PPL), and where tasks were
                 answered their mean accuracy falls
    sensitive    an attack's advantage, the exposure of canaries or extraction falls, at the level that is left after
                 Holm's correction over all measures of all groups

tau is the rise of the NLL at which perplexity rises by 0.3. A change of NLL is decided without correction, since tau
asks for a size and not for a sign. Neither is no proof of absence: it holds for this intervention on these texts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from geoquant.outliers.observed import Effect
from geoquant.privacy.statistics import holm

__all__ = [
    "BOTH",
    "FUNCTIONAL",
    "NEITHER",
    "SENSITIVE",
    "Kappa",
    "Label",
    "agreement",
    "falls",
    "kappa",
    "labels",
    "overlap_weight",
    "percentile_ranks",
    "scores",
    "threshold",
]

FUNCTIONAL, SENSITIVE, BOTH, NEITHER = "functional", "sensitive", "both", "neither"
RISE = 0.3  # of perplexity
LEVEL = 0.05


@dataclass(frozen=True)
class Label:
    """What a group is, and the numbers that decided it.

    nll, se: change of the NLL of public text; tau: its threshold. p: Holm-corrected, of the privacy measure named by
    `by` that fell most surely; 1 and None where none was measured.
    """

    part: str
    intervention: str
    functional: bool
    sensitive: bool
    nll: float
    se: float | None
    tau: float
    p: float
    by: str | None

    @property
    def name(self) -> str:
        """One of the four."""
        if self.functional:
            return BOTH if self.sensitive else FUNCTIONAL
        return SENSITIVE if self.sensitive else NEITHER

    @property
    def sentence(self) -> str:
        """The decision in words."""
        spread = "" if self.se is None else f" +- {self.se:.4f}"
        what = self.by if self.by in ("exposure", "extraction") else f"the advantage of the {self.by} attack"
        private = f"{what} falls with p = {self.p:.2g}" if self.sensitive else "no privacy measure falls surely"
        if self.by is None:
            private = "no privacy measure was taken"
        return (
            f"{self.part} is {self.name}: {self.intervention} changes public NLL by {self.nll:.4f}{spread} nats "
            f"(threshold {self.tau:.4f}), and {private}"
        )


def threshold(perplexity: float, rise: float = RISE) -> float:
    """The rise of the mean NLL (nats) at which a perplexity rises by `rise`: `ln(1 + rise / perplexity)`."""
    if not perplexity > 0:
        raise ValueError(f"a perplexity above 0, but got {perplexity}")
    return math.log1p(rise / perplexity)


def labels(
    found: Sequence[Effect], *, measures: Collection[str] | None = None, level: float = LEVEL, rise: float = RISE
) -> tuple[Label, ...]:
    """A label for each effect; the privacy tests of all of them are corrected together.

    measures: the only ones to count (names of attacks, `exposure`, `extraction`), to compare labelings by different
    attacks; all that were taken by default.
    """
    tests = [
        (index, name, p)
        for index, one in enumerate(found)
        for name, p in falls(one).items()
        if measures is None or name in measures
    ]
    corrected = holm([p for *_, p in tests]) if tests else []
    surest: dict[int, tuple[float, str]] = {}
    for (index, name, _), p in zip(tests, corrected, strict=True):
        surest[index] = min(surest.get(index, (math.inf, "")), (p, name))
    made = []
    for index, one in enumerate(found):
        tau = threshold(math.exp(one.public.before), rise)
        p, by = surest.get(index, (1.0, None))
        rises = one.public.value > max(tau, 2 * (one.public.se or 0.0))
        fails = not one.tasks or np.mean([task.value for task in one.tasks.values()]) < 0
        made.append(
            Label(
                one.part,
                one.intervention,
                functional=bool(rises and fails),
                sensitive=p <= level,
                nll=one.public.value,
                se=one.public.se,
                tau=tau,
                p=p,
                by=by,
            )
        )
    return tuple(made)


def falls(one: Effect) -> dict[str, float]:
    """p-values of "this privacy measure fell", by measure; 1 for one that rose."""
    found = {name: shift.p for name, shift in one.attacks.items()}
    others = {"exposure": one.exposure, "extraction": one.extraction}
    return found | {name: shift.p if shift.value < 0 else 1.0 for name, shift in others.items() if shift is not None}


def percentile_ranks(values: Sequence[float] | Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 0 (smallest) to 1; ties share the mean of theirs, and one value alone is in the middle."""
    count = len(values)
    return (rankdata(values) - 1) / (count - 1) if count > 1 else np.full(count, 0.5)


def scores(found: Sequence[Effect]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"] | None]:
    """S_func and S_priv of each effect among the others, in [0, 1].

    S_func: percentile rank of the rise of public NLL. S_priv: that of the mean of the percentile ranks by which the
    privacy measures fell: advantages, gap, exposure, extraction, as far as all effects have them; None without any.
    """
    rises = percentile_ranks([one.public.value for one in found])
    measures = [
        {name: shift.value for name, shift in one.attacks.items()}
        | {name: s.value for name in ("gap", "exposure", "extraction") if (s := getattr(one, name)) is not None}
        for one in found
    ]
    shared = set.intersection(*(set(one) for one in measures)) if measures else set()
    if not shared:
        return rises, None
    ranks = [percentile_ranks([-one[name] for one in measures]) for name in sorted(shared)]
    return rises, percentile_ranks(np.mean(ranks, axis=0))


def overlap_weight(
    functional: Float[np.ndarray, " n"], private: Float[np.ndarray, " n"], preference: float
) -> Float[np.ndarray, " n"]:
    """Share of privacy in the treatment of each group, `lambda S_priv / ((1 - lambda) S_func + lambda S_priv)`.

    functional, private: S_func and S_priv in [0, 1]. preference: lambda in [0, 1], 1 for privacy alone; also what a
    group gets where both terms are zero.
    """
    own, other = np.asarray(functional, float), np.asarray(private, float)
    for name, values in (("S_func", own), ("S_priv", other), ("lambda", np.asarray(preference))):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must lie in [0, 1], got {values}")
    # Only their ratio counts, which keeps the smallest numbers from vanishing in a product.
    top = np.maximum(own, other)
    own, other = (np.divide(one, top, out=np.zeros_like(top), where=top > 0) for one in (own, other))
    weight = preference * other
    whole = (1 - preference) * own + weight
    return np.where(whole > 0, weight / np.where(whole > 0, whole, 1.0), preference)


@dataclass(frozen=True)
class Kappa:
    """Agreement of two labelings of `count` things: 1 is complete, 0 that of chance. ci: by bootstrap over things.

    value and ci are None where both gave all things one and the same label: then chance agrees too. same: share of
    things labelled alike.
    """

    value: float | None
    ci: tuple[float, float] | None
    same: float
    count: int


def kappa(
    first: Sequence[str], second: Sequence[str], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Kappa:
    """Cohen's kappa `(p_o - p_e) / (1 - p_e)` with a percentile interval.

    Cohen: A coefficient of agreement for nominal scales, Educational and Psychological Measurement 1960. Resamples that
    hold a single label say nothing and are left out.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"two labelings of the same things, but got {len(first)} and {len(second)} labels")
    names = sorted({*first, *second})
    place = np.array([names.index(a) * len(names) + names.index(b) for a, b in zip(first, second)])
    cells = np.bincount(place, minlength=len(names) ** 2)
    same = float(np.mean([a == b for a, b in zip(first, second)]))
    value = float(_kappas(cells[None], len(names))[0])
    if math.isnan(value):
        return Kappa(None, None, same, len(first))
    rng = np.random.default_rng(seed)
    drawn = _kappas(rng.multinomial(len(first), cells / cells.sum(), size=resamples), len(names))
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Kappa(value, (float(low), float(high)), same, len(first))


def _kappas(cells: Float[np.ndarray, "tables cells"], size: int) -> Float[np.ndarray, " tables"]:
    """Kappa of each table of counts; NaN where chance agrees on everything."""
    tables = cells.reshape(-1, size, size) / cells.sum(1)[:, None, None]
    same = np.einsum("tii->t", tables)
    chance = (tables.sum(1) * tables.sum(2)).sum(1)
    spare = 1 - chance
    return np.where(spare > 1e-12, (same - chance) / np.where(spare > 1e-12, spare, 1.0), np.nan)


def agreement(labelings: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Kappa]:
    """Kappa of every two labelings (by seed, by attack, by model) of the same groups."""
    return {(a, b): kappa(labelings[a], labelings[b]) for a, b in combinations(labelings, 2)}

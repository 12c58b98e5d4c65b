"""What all effects of a model say together: a label for each group, and how far the labels can be trusted.

Labels are those of taxonomy.py. They are compared between interventions, between measures of privacy, and between two
disjoint halves of the data: what is a property of the weights should not depend on who asks. Beside the rule stands the
gap of losses, which has more power than a rate but is no attack: it decides no label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from scipy.stats import binomtest, norm

from geoquant.outliers.groups import RANDOM, TOP, Group
from geoquant.outliers.observed import Effect, Observed, contrast, half
from geoquant.outliers.paired import shift
from geoquant.outliers.taxonomy import LEVEL, Label, falls, kappa, labels, overlap_weight, scores
from geoquant.privacy.statistics import holm

__all__ = ["Identified", "agreements", "controls", "identified", "precision", "tests"]

Effects = Mapping[str, Mapping[str, Effect]]  # by intervention, by name of the group


@dataclass(frozen=True)
class Identified:
    """One group under one intervention.

    functional_rank, private_rank: S_func and S_priv among the groups of this intervention; omega: the overlap weight;
    both None where no privacy was measured. gap_p: of "the gap did not shrink", Holm-corrected over all effects; of a
    normal statistic.
    """

    group: Group
    effect: Effect
    label: Label
    functional_rank: float
    private_rank: float | None
    omega: float | None
    gap_p: float | None

    def to_dict(self) -> dict:
        """For JSON: None stands for what is not finite."""
        return {
            "group": self.group.name,
            "intervention": self.effect.intervention,
            "sites": [part.site for part in self.group.parts],
            "block": self.group.block,
            "kind": self.group.kind,
            "role": self.group.role,
            "label": self.label.name,
            "functional": self.label.functional,
            "sensitive": self.label.sensitive,
            "threshold": self.label.tau,
            "p_holm": self.label.p,
            "by": self.label.by,
            "gap_p_holm": self.gap_p,
            "s_func": self.functional_rank,
            "s_priv": self.private_rank,
            "omega": self.omega,
            "sentence": self.label.sentence,
            "effect": {k: v for k, v in self.effect.to_dict().items() if k not in ("part", "intervention")},
        }


def identified(groups: Sequence[Group], found: Effects, preference: float) -> dict[str, list[Identified]]:
    """Labels, ranks and weights of all groups, by intervention; tests of all of them are corrected together."""
    order = [(do, group) for do in found for group in groups]
    effects = [found[do][group.name] for do, group in order]
    gaps = [gap_fall(one) for one in effects]
    known = [index for index, p in enumerate(gaps) if p is not None]
    for index, p in zip(known, holm([gaps[index] for index in known]) if known else []):
        gaps[index] = p
    named = labels(effects)
    made: dict[str, list[Identified]] = {}
    for start, do in zip(range(0, len(order), len(groups)), found):
        own = slice(start, start + len(groups))
        functional, private = scores(effects[own])
        weights = None if private is None else overlap_weight(functional, private, preference)
        made[do] = [
            Identified(
                group,
                effect,
                label,
                float(functional[i]),
                None if private is None else float(private[i]),
                None if weights is None else float(weights[i]),
                p,
            )
            for i, (group, effect, label, p) in enumerate(zip(groups, effects[own], named[own], gaps[own]))
        ]
    return made


def gap_fall(one: Effect) -> float | None:
    """p of "the gap between members' and others' losses did not shrink", one-sided, from its standard error."""
    if one.gap is None:
        return None
    if one.gap.se == 0:
        return 1.0
    return float(norm.cdf(one.gap.value / one.gap.se))


def tests(found: Effects) -> int:
    """How many tests of privacy measures share the level."""
    return sum(len(falls(one)) for own in found.values() for one in own.values())


def precision(found: Effects, level: float = LEVEL) -> dict | None:
    """How surely falls of an advantage were measured: with less precision, less can be found sensitive.

    errors: from how many standard errors on a fall counts where Holm's correction is hardest. median: by attack, the
    median standard error of the change of its advantage, of effects that moved any record past another. None without
    attacks.
    """
    count = tests(found)
    attacks = sorted({name for own in found.values() for one in own.values() for name in one.attacks})
    if not count or not attacks:
        return None
    median = {}
    for name in attacks:
        changes = [one.attacks[name].difference for own in found.values() for one in own.values() if one.attacks]
        moved = [abs(2 * change.value / change.z) for change in changes if change.z]
        if moved:
            median[name] = float(np.median(moved))
    return {"errors": float(norm.isf(level / count / 2)), "median": median}


# ---- do labels agree?


def agreements(groups: Sequence[Group], found: Effects, before: Observed) -> list[dict]:
    """Kappa of labelings that should be one: of interventions, of privacy measures, of halves of the data.

    of: what is compared: the whole `label`, or its part `functional` or `sensitive`. Measures of privacy share what is
    functional, so only `sensitive` is asked of them.
    """
    told = []
    whole = {do: _labelled(groups, found)[do] for do in found}
    for first, second in combinations(found, 2):
        told += _pair("interventions", None, (first, second), (whole[first], whole[second]))
    names = sorted({name for own in found.values() for one in own.values() for name in falls(one)})
    by_measure = {name: _labelled(groups, found, name) for name in names}
    for do in found:
        for first, second in combinations(names, 2):
            pair = by_measure[first][do], by_measure[second][do]
            told += _pair("measures", do, (first, second), pair, ("sensitive",))
    if len(before.windows) >= 4:
        halves = []
        for which in (0, 1):
            start = half(before, which)
            parts = {
                do: {
                    name: contrast(start, half(one.after, which), one.part, one.intervention)
                    for name, one in own.items()
                }
                for do, own in found.items()
            }
            halves.append(_labelled(groups, parts))
        for do in found:
            told += _pair("halves", do, ("first half", "second half"), (halves[0][do], halves[1][do]))
    return told


def _labelled(groups: Sequence[Group], found: Effects, measure: str | None = None) -> dict[str, list[Label]]:
    effects = [found[do][group.name] for do in found for group in groups]
    named = labels(effects, measures=None if measure is None else [measure])
    return {do: list(named[i * len(groups) : (i + 1) * len(groups)]) for i, do in enumerate(found)}


def _pair(
    what: str,
    do: str | None,
    names: tuple[str, str],
    pair: tuple[Sequence[Label], Sequence[Label]],
    asked: Sequence[str] = ("label", "functional", "sensitive"),
) -> list[dict]:
    read = {
        "label": lambda one: one.name,
        "functional": lambda one: str(one.functional),
        "sensitive": lambda one: str(one.sensitive),
    }
    return [
        {
            "what": what,
            "intervention": do,
            "first": names[0],
            "second": names[1],
            "of": name,
            **asdict(kappa(*([read[name](one) for one in side] for side in pair))),
        }
        for name in asked
    ]


# ---- is a score better than chance?


def controls(found: dict[str, list[Identified]]) -> list[dict]:
    """Top columns against as many random ones of the same site: paired over sites, for every intervention and measure.

    value, ci: mean of top minus random with Student's t. larger, ties: sites where top has more, and as much; p: of a
    fair coin over the rest, which no single site can decide.
    """
    told = []
    for do, rows in found.items():
        sides = {
            role: {row.group.parts[0].site: row for row in rows if row.group.role == role} for role in (TOP, RANDOM)
        }
        sites = [site for site in sides[TOP] if site in sides[RANDOM]]
        for measure, read in CONTROLLED.items():
            pairs = [tuple(read(sides[role][site].effect) for role in (RANDOM, TOP)) for site in sites]
            pairs = [pair for pair in pairs if all(v is not None and math.isfinite(v) for v in pair)]
            if not pairs:
                continue
            random, top = map(np.array, zip(*pairs))
            change = shift(random, top)
            larger, ties = int((top > random).sum()), int((top == random).sum())
            p = float(binomtest(larger, len(pairs) - ties).pvalue) if len(pairs) > ties else 1.0
            told.append(
                {
                    "intervention": do,
                    "measure": measure,
                    "random": change.before,
                    "top": change.after,
                    "value": change.value,
                    "ci": change.ci,
                    "larger": larger,
                    "ties": ties,
                    "sites": len(pairs),
                    "p": p,
                }
            )
    return told


CONTROLLED = {
    "public": lambda one: one.public.value,
    "gap": lambda one: None if one.gap is None else -one.gap.value,
}

"""What changed between two measurements of the same windows, records, spans or canaries, and how sure that is.

Everything is paired: what makes a record easy for both models cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binomtest, t

from geoquant.privacy.delong import Difference, Sides, paired_difference
from geoquant.privacy.statistics import auc, needed, tpr_at_fpr

__all__ = ["AdvantageShift", "FlipShift", "GapShift", "Shift", "advantage_shift", "flip_shift", "gap_shift", "shift"]

FALSE_POSITIVE_RATES = (0.1, 0.01)


@dataclass(frozen=True)
class Shift:
    """A mean before and after, its change, standard error and t interval over `count` pairs, two-sided p.

    se and ci are None for fewer than two pairs.
    """

    before: float
    after: float
    value: float
    se: float | None
    ci: tuple[float, float] | None
    p: float
    count: int


def shift(before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], *, level: float = 0.95) -> Shift:
    """The mean change, with Student's t for paired differences.

    Where all pairs change by the same amount, p is that of n fair coins that all fell alike.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"pairs of {len(before)} and {len(after)} values")
    change = np.asarray(after, float) - np.asarray(before, float)
    count, value = len(change), float(change.mean())
    means = float(np.mean(before)), float(np.mean(after))
    if count < 2:
        return Shift(*means, value, None, None, 1.0, count)
    se = float(change.std(ddof=1)) / count**0.5
    half = float(t.ppf((1 + level) / 2, count - 1)) * se
    if se <= 1e-12 * abs(value) or se == 0:
        p = 1.0 if value == 0 else min(1.0, 2 * 0.5**count)
    else:
        p = float(2 * t.sf(abs(value) / se, count - 1))
    return Shift(*means, value, se, (value - half, value + half), p, count)


@dataclass(frozen=True)
class AdvantageShift:
    """What became of one attack.

    auc: before and after. difference: of the AUC, with DeLong's interval and test. before, after: the advantage
    2 |AUC - 1/2|. value, ci: its change. p: of "it did not become smaller"; an AUC pulled below 1/2 as far as it was
    above is no protection and has no small p. tpr: share of members found, before and after, by false positive rate,
    where the non-members are enough for one.
    """

    auc: tuple[float, float]
    difference: Difference
    before: float
    after: float
    value: float
    ci: tuple[float, float]
    p: float
    tpr: dict[str, tuple[float, float]]


def advantage_shift(before: Sides, after: Sides, *, level: float = 0.95) -> AdvantageShift:
    """Compare the scores of an attack on (members, non-members) before and after.

    With a = AUC - 1/2, the advantage is smaller if both `a_1 < a_0` and `a_1 > -a_0` (signs such that a_0 > 0). Each is
    a paired DeLong test, and the larger of both p-values is valid for the two together (Berger: Multiparameter
    hypothesis testing and acceptance sampling, Technometrics 1982).
    """
    areas = auc(*before), auc(*after)
    turned = [_turned(side) if area < 0.5 else side for side, area in zip((before, after), areas)]
    own = turned[0]
    same = _turned(after) if areas[0] < 0.5 else after
    below, above = paired_difference(own, same), paired_difference(_turned(own), same)
    p = max(below.p if below.value < 0 else 1.0, above.p if above.value > 0 else 1.0)
    change = paired_difference(*turned, level=level)
    advantages = tuple(2 * abs(area - 0.5) for area in areas)
    ci = tuple(float(np.clip(2 * end, -1, 1)) for end in change.ci)
    tpr = {
        f"{rate:g}": (tpr_at_fpr(*before, rate)[0], tpr_at_fpr(*after, rate)[0])
        for rate in FALSE_POSITIVE_RATES
        if len(before[1]) >= needed(rate)
    }
    difference = paired_difference(before, after, level=level)
    return AdvantageShift(areas, difference, *advantages, advantages[1] - advantages[0], ci, p, tpr)


def _turned(sides: Sides) -> Sides:
    """The scores of an attacker who says the opposite."""
    return -sides[0], -sides[1]


@dataclass(frozen=True)
class FlipShift:
    """A rate before and after, of `count` yes-or-no outcomes; won and lost ones, and McNemar's exact two-sided p."""

    before: float
    after: float
    value: float
    won: int
    lost: int
    p: float
    count: int


def flip_shift(
    before: Sequence[bool] | Bool[np.ndarray, " n"], after: Sequence[bool] | Bool[np.ndarray, " n"]
) -> FlipShift:
    """Of the outcomes that changed: are gains and losses a fair coin?"""
    if len(before) != len(after) or not len(before):
        raise ValueError(f"pairs of {len(before)} and {len(after)} outcomes")
    old, new = np.asarray(before, bool), np.asarray(after, bool)
    won, lost = int((new & ~old).sum()), int((old & ~new).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return FlipShift(old.mean().item(), new.mean().item(), (won - lost) / len(old), won, lost, p, len(old))


@dataclass(frozen=True)
class GapShift:
    """How far the losses of members lie below those of non-members (nats per token, size of the mean difference),
    before and after; the change of that size and its standard error over records.
    """

    before: float
    after: float
    value: float
    se: float


def gap_shift(before: Sides, after: Sides) -> GapShift:
    """Of scores like mean log-likelihoods, of (members, non-members). It still moves where the AUC has long been 1."""
    gaps = [float(np.mean(sides[0]) - np.mean(sides[1])) for sides in (before, after)]
    changes = [new - old for old, new in zip(before, after)]
    se = sum(change.var(ddof=1) / len(change) for change in changes if len(change) > 1) ** 0.5
    return GapShift(abs(gaps[0]), abs(gaps[1]), abs(gaps[1]) - abs(gaps[0]), float(se))

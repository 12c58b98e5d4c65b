"""The variance of an AUC, and whether two AUCs on the same records differ.

A member's placement is the share of non-members it outscores, a non-member's the share of members that outscore it
(ties count half). The AUC is the mean of either, and for n members and m non-members

    Var(AUC) = Var(members' placements) / n + Var(non-members' placements) / m

DeLong, DeLong, Clarke-Pearson: Comparing the areas under two or more correlated receiver operating characteristic
curves, Biometrics 1988. The placements come from three rankings, O(N log N) in place of O(n m): Sun and Xu: Fast
implementation of DeLong's algorithm, IEEE Signal Processing Letters 2014.

Both formulas are large-sample ones. Where no placement varies (an AUC of 0 or 1, or scores that are all equal) the
variance is zero, which is not certainty: min(n, m) disjoint pairs of a member and a non-member are then as many
independent trials that all ended alike, and the interval is the exact one of such trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from geoquant.privacy.statistics import auc, clopper_pearson

__all__ = ["Difference", "delong_interval", "paired_difference", "placements"]

Sides = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]  # scores of members and of non-members
NOTHING = 1e-18  # a variance below: rounding of placements that are all equal


@dataclass(frozen=True)
class Difference:
    """AUC of the second minus AUC of the first, its interval, and the test of no difference (two-sided).

    z is None where no placement varies and the p-value is that of the exact test instead.
    """

    value: float
    ci: tuple[float, float]
    z: float | None
    p: float


def placements(members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"]) -> Sides:
    """Placements of the members among the non-members (n,) and of the non-members among the members (m,)."""
    n, m = len(members), len(nonmembers)
    ranks = rankdata(np.concatenate([members, nonmembers]))
    # A rank among all, less the rank in the own sample, counts those of the other sample below.
    return (ranks[:n] - rankdata(members)) / m, 1 - (ranks[n:] - rankdata(nonmembers)) / n


def _variance(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """Variance of the mean, from placements or differences of placements; a side of one record counts as constant."""
    return float(sum(part.var(ddof=1) / len(part) for part in (inside, outside) if len(part) > 1))


def delong_interval(
    members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"], *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the AUC by DeLong's variance, made on the logit scale so that it stays between 0 and 1."""
    value, pairs = auc(members, nonmembers), min(len(members), len(nonmembers))
    variance = _variance(*placements(members, nonmembers))
    if value in (0.0, 1.0):
        return clopper_pearson(round(value * pairs), pairs, level)
    if variance < NOTHING:
        # All scores equal: every pair is a tie, and |AUC - 1/2| is at most half the rate of other pairs.
        other = clopper_pearson(0, pairs, level)[1]
        return value - other / 2, value + other / 2
    half = norm.ppf((1 + level) / 2) * np.sqrt(variance) / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def paired_difference(first: Sides, second: Sides, *, level: float = 0.95) -> Difference:
    """DeLong's test of two attacks, or of one attack on two models, on the same records in the same order.

    first, second: scores of (members, non-members). Placements of one record under both are differenced, so what
    makes a record easy for both cancels.
    """
    value = auc(*second) - auc(*first)
    one, two = placements(*first), placements(*second)
    variance = _variance(two[0] - one[0], two[1] - one[1])
    if variance < NOTHING:
        # k pairs whose outcomes all differ by `value`. Were the difference zero, an outcome of `value` had a chance
        # of at most 1 / (1 + |value|), since the others are at most 1 away on the other side.
        pairs = min(len(part) for part in first)
        other = clopper_pearson(0, pairs, level)[1]
        ci = max(-1.0, value - 2 * other), min(1.0, value + 2 * other)
        return Difference(value, ci, None, min(1.0, 2 * (1 + abs(value)) ** -pairs))
    error = float(np.sqrt(variance))
    half = float(norm.ppf((1 + level) / 2)) * error
    z = value / error
    return Difference(value, (max(-1.0, value - half), min(1.0, value + half)), z, float(2 * norm.sf(abs(z))))

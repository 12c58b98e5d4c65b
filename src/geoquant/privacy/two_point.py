"""Two-point audit: many runs of a mechanism on two neighbours, and the epsilon that telling them apart disproves.

If a mechanism is (epsilon, delta)-DP between x and x', then for every event S and both ways round

    P[M(x) in S] <= e^epsilon P[M(x') in S] + delta,

so an event of odds p and q shows epsilon >= log((p - delta) / q). The event is a threshold on a score of what was
released; it is chosen on one half of the runs, and judged on the other half with exact binomial intervals (Clopper and
Pearson 1934), each at half of the error, so the bound holds at the stated confidence whatever the score.

Which pairs are looked at decides what can be found. A mechanism that rounds before it adds noise is only caught by
neighbours on two sides of a boundary, an outlier that is stored beside the codes only by moving that outlier a little:
so pairs carry their own distance, and the claim is taken at that distance. A bound is never an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

from geoquant.errors import UserError

__all__ = ["Pair", "PairAudit", "audit_pairs", "lower_bound"]

THRESHOLDS = 400
CAUTION = 1000


@dataclass(frozen=True, eq=False)
class Pair:
    """Two neighbouring inputs, how far apart they are in the norm of the claim, and how releases are scored.

    score: from what `run` returns to one number per run; which side has the higher ones does not matter.
    """

    name: str
    one: object
    other: object
    distance: float
    score: Callable[[np.ndarray], Float[np.ndarray, " runs"]] = field(default=np.ravel)


@dataclass(frozen=True)
class PairAudit:
    """What one pair showed. epsilon: a lower bound at `confidence`, over all pairs of the audit together.

    odds: of the chosen event on both sides, on the half that judged. caught: the claim is disproved.
    """

    name: str
    epsilon: float
    claimed: float
    delta: float
    confidence: float
    runs: int
    odds: tuple[float, float]

    @property
    def caught(self) -> bool:
        return self.epsilon > self.claimed


def audit_pairs(
    run: Callable[[object, int], np.ndarray],
    pairs: Sequence[Pair],
    claimed: Callable[[float], float],
    *,
    delta: float,
    runs: int = 100_000,
    confidence: float = 0.999,
) -> list[PairAudit]:
    """The audit of every pair, together wrong with probability at most 1 - confidence.

    run(x, n): what n independent runs on x released, first axis n. claimed(distance): the epsilon that is claimed at
    this delta for inputs so far apart.
    """
    if not pairs:
        raise UserError("an audit needs a pair of neighbours")
    each = 1 - (1 - confidence) / len(pairs)
    found = []
    for pair in pairs:
        scores = [np.asarray(pair.score(run(side, runs)), np.float64) for side in (pair.one, pair.other)]
        epsilon, odds = lower_bound(*scores, delta=delta, confidence=each)
        found.append(PairAudit(pair.name, epsilon, claimed(pair.distance), delta, confidence, runs, odds))
    return found


def lower_bound(
    one: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"], *, delta: float, confidence: float
) -> tuple[float, tuple[float, float]]:
    """The largest epsilon that these scores disprove (0 when none), and the observed odds of the event that does it.

    Runs must be independent: the first half of each side chooses, the second judges.
    """
    if min(len(one), len(other)) < 2 or np.isnan(one).any() or np.isnan(other).any():
        raise UserError("an audit needs runs on both sides whose scores are numbers", got=f"{len(one)}, {len(other)}")
    if not (0 < confidence < 1 and 0 <= delta < 1):
        raise UserError("a confidence and a delta lie between 0 and 1", got=f"{confidence}, {delta}")
    chooses = [side[: len(side) // 2] for side in (one, other)]
    judges = [side[len(side) // 2 :] for side in (one, other)]
    pooled = np.sort(np.concatenate(chooses))
    places = np.unique(np.linspace(0, len(pooled) - 1, THRESHOLDS).astype(int))
    # Far tails are where small odds are: every value among the outermost, quantiles between.
    ends = np.arange(min(THRESHOLDS // 4, len(pooled)))
    thresholds = np.unique(pooled[np.concatenate([places, ends, len(pooled) - 1 - ends])])
    ways = [(above, swap) for above in (True, False) for swap in (True, False)]
    # Chosen with more caution than judged: the best of many thresholds at the ends of a sample are best by chance.
    wary = 1 - (1 - confidence) / CAUTION
    bounds = [_bounds(chooses, thresholds, *way, delta, wary) for way in ways]
    best = max(range(len(ways)), key=lambda index: bounds[index].max())
    above, swap = ways[best]
    threshold = thresholds[[int(bounds[best].argmax())]]
    epsilon = float(_bounds(judges, threshold, above, swap, delta, confidence)[0])
    rates = [float(_event(side, threshold, above)[0] / len(side)) for side in judges]
    return max(0.0, epsilon), (rates[0], rates[1])


def _event(side: np.ndarray, thresholds: np.ndarray, above: bool) -> Float[np.ndarray, " t"]:
    """How many scores are at least each threshold, or below it."""
    below = np.searchsorted(np.sort(side), thresholds, side="left")
    return len(side) - below if above else below


def _bounds(
    sides: list, thresholds: np.ndarray, above: bool, swap: bool, delta: float, confidence: float
) -> Float[np.ndarray, " t"]:
    """`log((p - delta) / q)` with p at its lower and q at its upper limit, each missed with half of the error."""
    many, few = sides[::-1] if swap else sides
    error = (1 - confidence) / 2
    hits, misses = _event(many, thresholds, above), _event(few, thresholds, above)
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), len(many) - hits + 1, error), 0.0)
    high = np.where(misses < len(few), betaincinv(misses + 1, np.maximum(len(few) - misses, 1), 1 - error), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(low > delta, np.log(np.maximum(low - delta, 0) / high), -math.inf)

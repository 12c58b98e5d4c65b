"""One-run audit: a lower bound on epsilon from a single run of a procedure on randomly included canaries.

Every one of m canaries is put in by its own fair coin, the procedure runs once, and from what it released the
auditor gives each canary a score. The `high` highest scores are guessed "in", the `low` lowest "out", the rest
is abstained from: r = high + low guesses, v of them right. If the procedure is (epsilon, delta)-DP, then

    P[right guesses >= v] <= b(0) + 2 m delta max_{i = 1..v} (b(i) - b(0)) / i,
    b(i) = P[W >= v - i],    W ~ Binomial(r, e^epsilon / (e^epsilon + 1)).

For delta = 0 this is randomised response being the easiest mechanism to guess. For delta > 0 the procedure may
give away some canaries outright, at most 2 m delta of them on average, and the second term pays for the worst
way of spending them. Every epsilon at which the right side is at most 1 - confidence is rejected; the bound is
the largest. Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023
(arXiv:2305.08846).

What must hold: coins fair, independent and unseen by whoever computes the scores; the numbers of guesses fixed
before the scores are looked at. Several candidates for them may be listed: each is then tested at
(1 - confidence) / candidates (Bonferroni). Including exactly half of the canaries is not independent coins.

What it cannot see: a bound near zero says that these canaries and these scores revealed little. It is never an
upper bound. Even against the best scores it stays below the truth: with m canaries and r guesses no bound can
exceed about log(r / log(1 / (1 - confidence))), and the Gaussian mechanism gives away less to single guesses
than its epsilon allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import bdtrc, expit
from scipy.stats import binom

from geoquant.errors import UserError

__all__ = ["OneRunBound", "check_fair", "epsilon_lower_bound", "fair_coins", "one_run", "p_value"]

STEPS = 40  # halvings of an interval of a few nats: beyond what any table shows
IMPLAUSIBLE = 1e-9  # fair coins fall this unevenly once in 10^9 audits

COVERS = (
    "adjacency: one canary in or out of the input; subject: the whole randomised procedure that ran once, from "
    "these inputs to what the scores were computed from; a lower bound shown by these canaries and these scores: "
    "other records, other canaries or stronger scores may reveal more"
)


@dataclass(frozen=True)
class OneRunBound:
    """Not (epsilon, delta)-DP for any smaller epsilon, at this confidence; epsilon 0: nothing was shown.

    guesses, correct: of the candidate that gave the bound. m: canaries. candidates: numbers of guesses tried,
    all paid for. covers: what the statement is about, in words that belong beside the number.
    """

    epsilon: float
    confidence: float
    delta: float
    guesses: int
    correct: int
    m: int
    candidates: int = 1
    covers: str = COVERS


def fair_coins(m: int, seed: int) -> Bool[np.ndarray, " m"]:
    """Which canaries to put in. The seed must not reach whoever computes the scores."""
    return np.random.default_rng(seed).random(m) < 0.5


def p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float = 0.0) -> float:
    """The most likely that an (epsilon, delta)-DP procedure lets `correct` or more of `guesses` be right.

    Raises UserError for numbers that cannot be, among them delta >= 1 / (2 m): such a delta lets a procedure
    give away a canary in every second run, and the bound says nothing.
    """
    if not 0 <= correct <= guesses <= m:
        raise UserError(
            "these guesses cannot be",
            got=f"{correct} right of {guesses} guesses on {m} canaries",
            wanted="0 <= right <= guesses <= canaries",
        )
    if not (epsilon >= 0 and 0 <= 2 * m * delta < 1):
        raise UserError(
            "the one-run audit needs epsilon >= 0 and 0 <= delta < 1 / (2 m)",
            got=f"epsilon={epsilon:g}, delta={delta:g}, m={m}",
            fix="use a smaller delta or fewer canaries",
        )
    # at_least[i] = P[W >= correct - i]; giving away more than all right guesses gains nothing.
    given_away = np.arange(correct + 1 if delta > 0 else 1)
    at_least = bdtrc(correct - given_away - 1, guesses, expit(epsilon))
    if len(given_away) == 1:
        return float(at_least[0])
    gain = np.max((at_least[1:] - at_least[0]) / given_away[1:])
    return float(min(1.0, at_least[0] + 2 * m * delta * gain))


def epsilon_lower_bound(m: int, guesses: int, correct: int, *, delta: float = 0.0, confidence: float = 0.95) -> float:
    """Largest epsilon that so many right guesses reject at this confidence; 0 when none is rejected.

    The p-value grows with epsilon (with 2 m delta < 1 it is a mixture of binomial tails), so that halving finds
    the place where it crosses 1 - confidence; the rejected end of the last interval is returned.
    """
    if not 0 < confidence < 1:
        raise UserError("a confidence lies between 0 and 1", got=confidence)
    error = 1 - confidence
    if p_value(m, guesses, correct, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(m, guesses, correct, high, delta) <= error:
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        if p_value(m, guesses, correct, middle, delta) <= error:
            low = middle
        else:
            high = middle
    return low


def one_run(
    scores: Float[np.ndarray, " m"],
    included: Bool[np.ndarray, " m"],
    candidates: Sequence[tuple[int, int]],
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> OneRunBound:
    """The bound from scores (higher = more likely in) and the coins.

    candidates: pairs (high, low), how many canaries are guessed "in" and "out"; fixed beforehand. Of several,
    the one with the largest bound is returned, each having been tested at (1 - confidence) / candidates.
    seed: ties are broken at random, so that the order in which canaries are listed gives nothing away.

    Raises UserError when scores and coins do not belong together, coins are not fair, or guesses exceed m.
    """
    m = len(scores)
    _check(scores, included, candidates)
    shuffled = np.random.default_rng(seed).permutation(m)
    falling = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    each = 1 - (1 - confidence) / len(candidates)
    found = []
    for high, low in candidates:
        correct = int(included[falling[:high]].sum() + (~included[falling[m - low :]]).sum())
        bound = epsilon_lower_bound(m, high + low, correct, delta=delta, confidence=each)
        found.append((bound, high + low, correct))
    epsilon, guesses, correct = max(found, key=lambda entry: entry[0])
    return OneRunBound(epsilon, confidence, delta, guesses, correct, m, len(candidates))


def check_fair(count: int, m: int) -> None:
    """Raises UserError where fair coins would hardly ever put `count` of m canaries in."""
    if 2 * min(binom.cdf(count, m, 0.5), binom.sf(count - 1, m, 0.5)) < IMPLAUSIBLE:
        raise UserError(
            "these canaries were not included by fair coins",
            got=f"{count} of {m} in",
            wanted="each in with probability 1/2, independently",
            fix="draw them with fair_coins before the run",
        )


def _check(scores: np.ndarray, included: np.ndarray, candidates: Sequence[tuple[int, int]]) -> None:
    m = len(scores)
    if scores.shape != (m,) or included.shape != (m,) or included.dtype != bool:
        raise UserError(
            "the one-run audit needs one score and one coin for each canary",
            got=f"scores {scores.shape}, coins {included.shape} of {included.dtype}",
            wanted="(m,) numbers and (m,) booleans",
        )
    if np.isnan(scores).any():
        raise UserError("a canary's score is not a number", got=f"{int(np.isnan(scores).sum())} NaN of {m}")
    check_fair(int(included.sum()), m)
    if not candidates:
        raise UserError("the one-run audit needs a number of guesses", fix="for example candidates=[(100, 100)]")
    for high, low in candidates:
        if high < 0 or low < 0 or not 0 < high + low <= m:
            raise UserError(
                "more guesses than canaries, or none",
                got=f"({high}, {low}) on {m} canaries",
                wanted="0 < high + low <= canaries",
            )

"""The one-run audit of planted canaries: can the model tell which of them a coin put into its training data?

A canary's score is the log-probability of its secret: of its digits among all digits where each is a token, and, where
a reference is given, by how much it exceeds the reference's. Coins know nothing of secrets, so nothing but what the
training data left in the weights can make the scores of the planted ones higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from geoquant.data.records import Record, Split
from geoquant.privacy.one_run import OneRunBound, check_fair, epsilon_lower_bound, one_run
from geoquant.privacy.scores import RecordScores, SplitScores

__all__ = ["audit_coins", "check_coins", "most", "secret_scores"]

DELTA = 1e-5
ONCE = "one canary in or out of the input"  # of COVERS, where every canary occurs once
SHARES = (0.1, 0.25, 0.5)  # of the canaries that are guessed in, and as many out: fixed before any score was seen


def secret_scores(scores: RecordScores, records: Sequence[Record]) -> Float[np.ndarray, " m"]:
    """Log-probability of each canary's secret, in nats; -inf where it was cut off."""
    found = np.full(len(records), -np.inf)
    for index, record in enumerate(records):
        part = scores.covering(index, record.canary.start, record.canary.end)
        if part is not None:
            nats = scores.log_prob[part].astype(np.float64)
            found[index] = (nats - np.nan_to_num(scores.digit_mass[part])).sum()
    return found


def flipped(split: Split) -> list[bool]:
    """How the coins of all canaries fell that have one; empty where one side is missing, which makes no bound."""
    if not (split.canaries and split.withheld):
        return []
    coins = (record.canary.included for record in (*split.canaries, *split.withheld))
    return [coin for coin in coins if coin is not None]


def check_coins(split: Split) -> None:
    """Before any model is asked: raises UserError where these coins cannot have been fair."""
    if coins := flipped(split):
        check_fair(sum(coins), len(coins))


def audit_coins(
    target: SplitScores, reference: SplitScores | None, split: Split, *, seed: int = 0
) -> OneRunBound | None:
    """The bound from the canaries whose inclusion a coin decided; None where none was flipped, or all fell alike.

    target, reference: scores of the split under the audited model and under one that never saw its canaries.
    """
    sides = [
        (split.canaries, target.canaries, reference and reference.canaries, True),
        (split.withheld, target.withheld, reference and reference.withheld, False),
    ]
    values, included = [], []
    for records, own, other, inside in sides:
        if own is None:
            return None
        scores = secret_scores(own, records)
        if other is not None:
            # What neither scores is no difference.
            base = secret_scores(other, records)
            scores = np.where(np.isfinite(base), scores - np.where(np.isfinite(base), base, 0.0), -np.inf)
        flipped = [record.canary.included is inside for record in records]
        values.append(scores[flipped])
        included.append(np.full(sum(flipped), inside))
    if not len(values[0]):
        return None
    scores, coins = np.concatenate(values), np.concatenate(included)
    found = one_run(scores, coins, candidates(len(scores)), delta=DELTA, seed=seed)
    # In or out is in with all its copies: of one record the bound says less.
    flipped = (r.canary for r in (*split.canaries, *split.withheld) if r.canary.included is not None)
    if (copies := max(canary.repeats for canary in flipped)) > 1:
        often = f"{ONCE} with all its copies, up to {copies}"
        found = replace(found, covers=found.covers.replace(ONCE, often))
    return found


def candidates(m: int) -> list[tuple[int, int]]:
    """Numbers of guesses for m canaries."""
    counts = sorted({max(1, int(share * m)) for share in SHARES}) if m > 1 else [1]
    return [(count, count if m > 1 else 0) for count in counts]


def most(bound: OneRunBound) -> float:
    """The largest epsilon that so many canaries could have shown, every guess being right."""
    each = 1 - (1 - bound.confidence) / bound.candidates
    tried = [high + low for high, low in candidates(bound.m)]
    return max(epsilon_lower_bound(bound.m, r, r, delta=bound.delta, confidence=each) for r in tried)

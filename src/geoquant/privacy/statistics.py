"""How well a score separates members from non-members, with intervals. Higher score = more likely a member.

Both samples are taken as independent draws; intervals are about the records, not about training randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import beta, mannwhitneyu, rankdata

__all__ = [
    "auc",
    "auc_interval",
    "chance_p",
    "clopper_pearson",
    "guessed_right",
    "holm",
    "needed",
    "realised_fpr",
    "roc_points",
    "tpr_at_fpr",
]

RESAMPLE_ELEMENTS = 1 << 23  # counts held at once while resampling


def auc(members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"]) -> float:
    """P(member score > non-member score) + P(equal) / 2: the Mann-Whitney statistic over n * m."""
    n, m = len(members), len(nonmembers)
    ranks = rankdata(np.concatenate([members, nonmembers]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(
    members: Float[np.ndarray, " n"],
    nonmembers: Float[np.ndarray, " m"],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the AUC, members and non-members resampled apart (stratified), seeded.

    Where the scores separate perfectly every resample gives the same AUC and the bootstrap says nothing. Then
    min(n, m) disjoint pairs (member, non-member) are as many independent trials of "the member scores
    higher", all decided alike, and their exact binomial interval is given.
    """
    n, m = len(members), len(nonmembers)
    if (value := auc(members, nonmembers)) in (0.0, 1.0):
        pairs = min(n, m)
        return clopper_pearson(round(value * pairs), pairs, level)
    rng = np.random.default_rng(seed)
    # Count how often each distinct score was drawn: the AUC of a resample is a dot product over the values.
    _, place = np.unique(np.concatenate([members, nonmembers]), return_inverse=True)
    width = int(place.max()) + 1
    values = np.empty(resamples)
    step = max(1, RESAMPLE_ELEMENTS // width)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        row = width * np.arange(size)[:, None]
        inside, outside = (
            np.bincount((row + side[rng.integers(0, len(side), (size, len(side)))]).ravel(), minlength=size * width)
            .reshape(size, width)
            .astype(np.float64)
            for side in (place[:n], place[n:])
        )
        below = np.cumsum(outside, axis=1) - outside / 2
        values[begin : begin + size] = (inside * below).sum(axis=1) / (n * m)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a rate (Clopper and Pearson 1934); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def guessed_right(members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"]) -> tuple[float, float] | None:
    """Share of right guesses about a record that is as likely a member as not, (TPR + TNR) / 2, and its standard error.

    The threshold, and the side of it on which members lie, are those that are best on one half of the records (every
    second one), judged on the other half, and the other way round. Judged where it was chosen, a threshold would be
    right more often than not by chance alone. None with fewer than two records on a side.
    """
    if min(len(members), len(nonmembers)) < 2:
        return None
    right: tuple[list, list] = ([], [])
    for half in (0, 1):
        sign, threshold = _threshold(members[half::2], nonmembers[half::2])
        right[0].append(sign * members[1 - half :: 2] >= threshold)
        right[1].append(sign * nonmembers[1 - half :: 2] < threshold)
    shares = [(np.concatenate(side).mean(), len(np.concatenate(side))) for side in right]
    error = 0.5 * math.sqrt(sum(share * (1 - share) / count for share, count in shares))
    return float(sum(share for share, _ in shares) / 2), float(error)


def _threshold(members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"]) -> tuple[int, float]:
    """(sign, t) so that calling `sign * score >= t` a member is right most often here."""
    best = (-1.0, 1, 0.0)
    for sign in (1, -1):
        inside, outside = np.sort(sign * members), np.sort(sign * nonmembers)
        at = np.unique(np.concatenate([inside, outside]))
        gain = (1 - np.searchsorted(inside, at) / len(inside)) - (1 - np.searchsorted(outside, at) / len(outside))
        place = int(gain.argmax())
        best = max(best, (float(gain[place]), sign, float(at[place])), key=lambda one: one[0])
    return best[1], best[2]


def tpr_at_fpr(
    members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"], fpr: float
) -> tuple[float, tuple[float, float]]:
    """Share of members above the lowest threshold that at most `fpr` of the non-members exceed, and its
    interval.

    Conservative: tied non-members are never split, so the realised rate is at most `fpr` (with m < 1 / fpr
    it is zero). The Clopper-Pearson interval is conditional on the threshold: it does not contain the
    threshold's own uncertainty, which is large when fpr * m is a handful of records.
    """
    allowed = int(np.floor(fpr * len(nonmembers) + 1e-9))
    if allowed >= len(nonmembers):
        hits = len(members)
    else:
        threshold = np.sort(nonmembers)[::-1][allowed]
        hits = int((members > threshold).sum())
    return hits / len(members), clopper_pearson(hits, len(members))


def needed(fpr: float) -> int:
    """Non-members without which a threshold of this false positive rate does not exist: one may be accused."""
    return math.ceil(1 / fpr - 1e-9)


def realised_fpr(fpr: float, nonmembers: int, level: float = 0.95) -> tuple[float, float]:
    """Where the true false positive rate of the threshold of `tpr_at_fpr` lies, given how many non-members set it.

    Exact for scores without ties: the share of a distribution above the (k + 1)-th largest of m draws is
    Beta(k + 1, m - k). With ties the true rate can only be lower.
    """
    allowed = min(int(np.floor(fpr * nonmembers + 1e-9)), nonmembers - 1)
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], allowed + 1, nonmembers - allowed)
    return float(low), float(high)


def chance_p(members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"]) -> float:
    """Two-sided p-value of "both sides score alike" (Mann and Whitney 1947, with its correction for ties)."""
    if np.ptp(rankdata(np.concatenate([members, nonmembers]))) == 0:
        return 1.0
    return float(mannwhitneyu(members, nonmembers, alternative="two-sided").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of k tests, corrected so that with level a the chance of any false alarm among them is at most a.

    The i-th smallest is multiplied by k - i + 1, and none becomes smaller than the one before (Holm 1979); no
    assumption on how the tests depend on each other.
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * np.asarray(p, float)[order])
    return np.minimum(corrected, 1.0).tolist()


def roc_points(
    members: Float[np.ndarray, " n"], nonmembers: Float[np.ndarray, " m"], points: int = 100
) -> tuple[list[float], list[float]]:
    """False and true positive rates from (0, 0) to (1, 1), for drawing.

    All corners of the empirical curve if they are at most `points`, else corners evenly thinned.
    """
    scores = rankdata(np.concatenate([members, nonmembers]))  # of -inf and -inf there is no difference
    order = np.argsort(-scores, kind="stable")
    is_member = (order < len(members)).astype(np.int64)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last of each run of ties
    tp = np.concatenate([[0], np.cumsum(is_member)[last]])
    fp = np.concatenate([[0], np.cumsum(1 - is_member)[last]])
    # A point between two others on one straight line draws nothing.
    turn = np.diff(tp)[:-1] * np.diff(fp)[1:] != np.diff(tp)[1:] * np.diff(fp)[:-1]
    keep = np.flatnonzero(np.concatenate([[True], turn, [True]]))
    if len(keep) > points:
        keep = keep[np.unique(np.linspace(0, len(keep) - 1, points).round().astype(int))]
    return (fp[keep] / len(nonmembers)).tolist(), (tp[keep] / len(members)).tolist()

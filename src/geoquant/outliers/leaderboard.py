"""Which score foretells what an intervention does? Rank correlations over sites, honest about how few sites there are.

Sites are not independent: neighbours in depth are alike, and so are sites of a kind. Where score and effect each owe a
third of their variance to the block or to the kind, a score that knows nothing has p < 0.05 in a third of all cases or
more, were sites dealt out freely. So intervals draw whole blocks, and what is tested is what a score says beyond block
and kind: the correlation of what is left of the ranks once both are taken out (two-way analysis of variance).

An effect that was itself measured with error caps what any score can reach: `ceiling` is the rank correlation r that
the effect would have with a second measurement of itself; a score without error could reach about its root.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata, spearmanr

from geoquant.privacy.statistics import holm

__all__ = ["FEWEST", "Prediction", "ceiling", "leaderboard"]

RESAMPLES = 2000
WORST = 10
FEWEST = 5


@dataclass(frozen=True)
class Prediction:
    """How one score orders an effect.

    rho: Spearman's rank correlation over `sites` sites. ci: its percentile bootstrap interval over blocks, 95%.
    partial: correlation of ranks beyond block and kind; NaN where these leave nothing. p: of no such correlation,
    two-sided, by permutation; p_holm: corrected over all rankings of the board, those that are the same over all sites
    counted once.
    hits: how many of the `worst` sites by effect are among as many by score; by chance worst^2 / sites.
    """

    name: str
    rho: float
    ci: tuple[float, float]
    partial: float
    p: float
    p_holm: float
    hits: int
    worst: int
    sites: int


def leaderboard(
    scores: Mapping[str, Float[np.ndarray, " sites"]],
    effect: Float[np.ndarray, " sites"],
    *,
    blocks: Sequence[object] | None = None,
    kinds: Sequence[object] | None = None,
    worst: int = WORST,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Prediction]:
    """All scores against one effect, the best first, those without a correlation (all equal) last. Sites where either
    is no number are left out of that score.

    blocks, kinds: of each site; by default every site is a block and all are of a kind, and `partial` is rho. Raises
    ValueError for fewer than five sites: no interval means anything there.
    """
    whole = np.arange(len(effect)) if blocks is None else np.unique(np.array(blocks, str), return_inverse=True)[1]
    alike = np.zeros(len(effect), int) if kinds is None else np.unique(np.array(kinds, str), return_inverse=True)[1]
    free = blocks is None and kinds is None
    found = []
    for name, score in scores.items():
        known = np.isfinite(score) & np.isfinite(effect)
        if known.sum() < FEWEST:
            raise ValueError(f"rank correlations need at least {FEWEST} sites, but {name} has {int(known.sum())}")
        groups = whole[known], None if free else alike[known]
        found.append((name, *_correlated(score[known], effect[known], *groups, worst, resamples, seed)))
    rankings = [_ranking(score, effect) for score in scores.values()]
    once = {ranking: p for ranking, (_, _, _, _, p, _, _, _) in zip(rankings, found, strict=True)}
    corrected = dict(zip(once, holm(list(once.values())), strict=True))
    board = [
        Prediction(name, rho, ci, partial, p, corrected[ranking], hits, top, sites)
        for (name, rho, ci, partial, p, hits, top, sites), ranking in zip(found, rankings, strict=True)
    ]
    return sorted(board, key=lambda one: -abs(one.rho) if np.isfinite(one.rho) else 1.0)


def _ranking(score: Float[np.ndarray, " sites"], effect: Float[np.ndarray, " sites"]) -> tuple[float, ...]:
    """Ranks of the sites; the same for two scores where one orders all sites as the other does."""
    ranks = np.full(len(score), -1.0)
    known = np.isfinite(score) & np.isfinite(effect)
    ranks[known] = rankdata(score[known])
    return tuple(ranks.tolist())


def _correlated(
    score: Float[np.ndarray, " n"],
    effect: Float[np.ndarray, " n"],
    blocks: Int[np.ndarray, " n"],
    kinds: Int[np.ndarray, " n"] | None,
    worst: int,
    resamples: int,
    seed: int,
) -> tuple[float, tuple[float, float], float, float, int, int, int]:
    generator = np.random.default_rng(seed)
    rho = _spearman(score[None], effect[None])[0]
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    again = _resampled(score, effect, members, generator, resamples)
    # A resample whose values are all equal has no correlation.
    low, high = np.nanpercentile(again, [2.5, 97.5]) if np.isfinite(again).any() else (np.nan, np.nan)
    partial, p = _beyond(rankdata(score), rankdata(effect), blocks, kinds, generator, resamples)
    top = min(worst, len(score))
    hits = len(set(np.argsort(-score, kind="stable")[:top]) & set(np.argsort(-effect, kind="stable")[:top]))
    return float(rho), (float(low), float(high)), partial, p, hits, top, len(score)


def _resampled(
    score: Float[np.ndarray, " n"],
    effect: Float[np.ndarray, " n"],
    members: list[Int[np.ndarray, " m"]],
    generator: np.random.Generator,
    resamples: int,
) -> Float[np.ndarray, " resamples"]:
    """The rank correlation over blocks drawn with replacement, each with all its sites."""
    drawn = generator.integers(0, len(members), (resamples, len(members)))
    if len({len(one) for one in members}) == 1:
        sites = np.stack(members)[drawn].reshape(resamples, -1)
        return _spearman(score[sites], effect[sites])
    picked = [np.concatenate([members[block] for block in blocks]) for blocks in drawn]
    return np.array([_spearman(score[None, sites], effect[None, sites])[0] for sites in picked])


def _beyond(
    score: Float[np.ndarray, " n"],
    effect: Float[np.ndarray, " n"],
    blocks: Int[np.ndarray, " n"],
    kinds: Int[np.ndarray, " n"] | None,
    generator: np.random.Generator,
    resamples: int,
) -> tuple[float, float]:
    """Correlation of ranks once block and kind are taken out, and its p by permuting what is left (Freedman and Lane,
    Journal of Business and Economic Statistics 1983).
    """
    count = len(score)
    explained = np.ones((count, 1))
    if kinds is not None:
        explained = np.concatenate([one[:, None] == np.unique(one) for one in (blocks, kinds)], axis=1).astype(float)
    left, sizes, _ = np.linalg.svd(explained, full_matrices=False)
    basis = left[:, sizes > 1e-9 * sizes[0]]
    if count - basis.shape[1] < 2:
        return math.nan, 1.0

    def rest(ranks: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        return ranks - ranks @ basis @ basis.T

    one, other = rest(score[None]), rest(effect[None])
    if min(np.abs(one).max(), np.abs(other).max()) < 1e-9 * count:  # rounding of what is explained whole
        return math.nan, 1.0
    orders = generator.permuted(np.tile(np.arange(count), (resamples, 1)), axis=1)
    null = _pearson(one, rest(other[0][orders]))
    found = _pearson(one, other)[0]
    return float(found), float((1 + (np.abs(null) >= abs(found) - 1e-12).sum()) / (resamples + 1))


def _spearman(one: Float[np.ndarray, "k n"], other: Float[np.ndarray, "k n"]) -> Float[np.ndarray, " k"]:
    """Spearman's rank correlation of each row; NaN where a row is constant."""
    return _pearson(*(rankdata(values, axis=1) for values in (one, other)))


def _pearson(one: Float[np.ndarray, "k n"], other: Float[np.ndarray, "k n"]) -> Float[np.ndarray, " k"]:
    x, y = (values - values.mean(1, keepdims=True) for values in (one, other))
    lengths = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, (x * y).sum(1) / lengths, np.nan)


def ceiling(parts: Float[np.ndarray, "windows sites"], *, resamples: int = 200, seed: int = 0) -> float:
    """Rank correlation of an effect with a second measurement of itself on as much text.

    parts: the effect on each window. Means of random halves of the windows are correlated over the sites, and the mean
    correlation r of halves is carried to the whole by Spearman and Brown's `2 r / (1 + r)` (1910).
    """
    generator = np.random.default_rng(seed)
    half = len(parts) // 2
    if half < 1:
        raise ValueError("halves need at least two windows")
    found = []
    for _ in range(resamples):
        order = generator.permutation(len(parts))
        first, second = parts[order[:half]].mean(0), parts[order[half : 2 * half]].mean(0)
        found.append(spearmanr(first, second).statistic)
    r = float(np.nanmean(found))
    return 2 * r / (1 + r) if r > -1 else float("nan")

"""Which score foretells what an intervention does? Rank correlations over sites, honest about how few sites there are.

Sites are taken as independent. They are not: where score and effect each owe a third of their variance to where a block
is, or to the kind of its sites, a score that knows nothing has p < 0.05 in a third of all cases or more. What anybody
would guess (depth, size) belongs on the board beside it.

An effect that was itself measured with error caps what any score can reach: `ceiling` is the rank correlation that the
effect would have with a second measurement of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata, spearmanr

from geoquant.privacy.statistics import holm

__all__ = ["FEWEST", "Prediction", "ceiling", "leaderboard"]

RESAMPLES = 2000
WORST = 10
FEWEST = 5


@dataclass(frozen=True)
class Prediction:
    """How one score orders an effect.

    rho: Spearman's rank correlation over `sites` sites. ci: its percentile bootstrap interval over sites, 95%.
    p: of no correlation, two-sided, by permutation of the sites; p_holm: corrected over all scores of the board.
    hits: how many of the `worst` sites by effect are among as many by score; by chance worst^2 / sites.
    """

    name: str
    rho: float
    ci: tuple[float, float]
    p: float
    p_holm: float
    hits: int
    worst: int
    sites: int


def leaderboard(
    scores: Mapping[str, Float[np.ndarray, " sites"]],
    effect: Float[np.ndarray, " sites"],
    *,
    worst: int = WORST,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Prediction]:
    """All scores against one effect, the best first, those without a correlation (all equal) last. Sites where either
    is no number are left out of that score.

    Raises ValueError for fewer than five sites: no interval means anything there.
    """
    found = []
    for name, score in scores.items():
        known = np.isfinite(score) & np.isfinite(effect)
        if known.sum() < FEWEST:
            raise ValueError(f"rank correlations need at least {FEWEST} sites, but {name} has {int(known.sum())}")
        found.append((name, *_correlated(score[known], effect[known], worst, resamples, seed)))
    corrected = holm([p for _, _, _, p, _, _, _ in found])
    board = [
        Prediction(name, rho, ci, p, adjusted, hits, top, sites)
        for (name, rho, ci, p, hits, top, sites), adjusted in zip(found, corrected, strict=True)
    ]
    return sorted(board, key=lambda one: -abs(one.rho) if np.isfinite(one.rho) else 1.0)


def _correlated(
    score: Float[np.ndarray, " n"], effect: Float[np.ndarray, " n"], worst: int, resamples: int, seed: int
) -> tuple[float, tuple[float, float], float, int, int, int]:
    generator = np.random.default_rng(seed)
    count = len(score)
    rho = _spearman(score[None], effect[None])[0]
    drawn = generator.integers(0, count, (resamples, count))
    again = _spearman(score[drawn], effect[drawn])
    # A resample whose values are all equal has no correlation.
    low, high = np.nanpercentile(again, [2.5, 97.5]) if np.isfinite(again).any() else (np.nan, np.nan)
    orders = generator.permuted(np.tile(np.arange(count), (resamples, 1)), axis=1)
    null = _pearson(rankdata(score)[None], rankdata(effect)[orders])  # ranks of a permutation are permuted ranks
    p = (1 + (np.abs(null) >= abs(rho) - 1e-12).sum()) / (resamples + 1) if np.isfinite(rho) else 1.0
    top = min(worst, count)
    hits = len(set(np.argsort(-score, kind="stable")[:top]) & set(np.argsort(-effect, kind="stable")[:top]))
    return float(rho), (float(low), float(high)), float(p), hits, top, count


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

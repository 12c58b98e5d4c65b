"""Likelihood-ratio attack (LiRA): is this record's score what models that saw it give it, or models that did not?

Shadow models are trained like the target on random halves of one pool. Per record, Gaussians are fitted to the
scores under the models that saw it (in) and under those that did not (out); with s the target's score,

    online    log N(s; mean_in, std_in) - log N(s; mean_out, std_out)
    offline   (s - mean_out) / std_out              no model that saw the record is needed

What makes a record easy for everyone cancels; how far training moves it counts relative to how much it varies.
Carlini, Chien, Nasr, Song, Terzis, Tramer: Membership Inference Attacks From First Principles, S&P 2022
(arXiv:2112.03570).

**Score.** For language models the mean log-probability of the true tokens (`loss.score`), or `logit` of it: the
paper's log p / (1 - p) with p the geometric mean of the token probabilities. The two agree where p is small; near
p = 1, where log p piles up below 0, the logit is closer to a Gaussian, as the ratio assumes.

**Few shadow models.** A standard deviation from a handful of scores is noise, and dividing by it ruins the
attack. Pooling fits one for all records, of in and of out scores each around their own record's mean (degrees of
freedom counted); the paper does so below about 64 models, and so does this file unless told. With one out model
for every record nothing is left to fit it from: the unit is then 1, and offline is the reference attack.

Means from a handful of scores are noise too: the paper's online ratio then does worse than offline. Here the effect of
training, mean_in - mean_out, is taken as drawn from N(effect, spread) over the records, and both from the records
themselves (empirical Bayes, moments). Then models that saw a record tell how hard it is as well, every model counts for
both means, and the ratio is of the two predictive distributions, which know how uncertain the means are. With many
models this is the paper's ratio; with `spread` infinite it is so with few.
`python benchmarks/shadows.py toy` compares the three.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from geoquant.errors import UserError
from geoquant.privacy.attacks.pool import Sides, apart, pooled_shadows
from geoquant.privacy.attacks.pool import pooled as pooled_scores
from geoquant.privacy.evidence import Evidence

__all__ = ["halves", "joint", "logit", "offline", "online"]

POOL_BELOW = 64  # shadow models: the paper's own limit
CERTAIN = 1e-6  # a record predicted better than this many nats per token counts as predicted so well
SMALLEST = 1e-6  # share of the pooled standard deviation below which a record's own is not believed


def joint(members: Evidence, nonmembers: Evidence) -> Sides:
    """The online ratio of all records, the pooled deviations those of both sides together.

    Raises UserError without shadow models.
    """
    shadows = pooled_shadows(members, nonmembers)
    target = pooled_scores(members, nonmembers)
    return apart(online(logit(target), logit(shadows.mean_log_prob), shadows.inside), members)


def logit(mean_log_prob: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
    """log p / (1 - p) for p = exp(mean_log_prob), nats per token; -inf stays -inf."""
    value = np.minimum(np.asarray(mean_log_prob, np.float64), -CERTAIN)
    return value - np.log(-np.expm1(value))


def halves(models: int, n: int, seed: int) -> Bool[np.ndarray, "models n"]:
    """Which shadow model is trained on which record: every record in exactly models // 2 of them, at random.

    Independent coins would leave some record of a large pool without a model on one of the sides.
    """
    return np.random.default_rng(seed).random((models, n)).argsort(axis=0) < models // 2


def online(
    target: Float[np.ndarray, " n"],
    shadow: Float[np.ndarray, "models n"],
    inside: Bool[np.ndarray, "models n"],
    *,
    pooled: bool | None = None,
    spread: float | None = None,
) -> Float[np.ndarray, " n"]:
    """Log-likelihood ratio of every record, in nats; higher = more likely a member.

    shadow: the same scores under the shadow models; inside: which of them saw the record. pooled: one standard
    deviation for all records (None: below 64 models). spread: standard deviation of the effect of training over the
    records (None: by moments; infinite: each record's means stand alone). A record with target score -inf keeps it.

    Raises UserError for a record that no shadow model saw, or that every one saw.
    """
    scored = _check(target, shadow, inside)
    pooled = len(shadow) < POOL_BELOW if pooled is None else pooled
    needed = 1 if pooled else 2
    mean_in, sum_in, count_in = _moments(shadow, inside & scored)
    mean_out, sum_out, count_out = _moments(shadow, ~inside & scored)
    _enough(count_in[scored], needed, "saw")
    _enough(count_out[scored], needed, "did not see")
    effects = mean_in - mean_out
    # With one score on either side the spread of their differences is all there is: two such variances.
    alone = float(effects[scored].std() / np.sqrt(2)) if scored.any() else 0.0
    std_out = _pooled(sum_out, count_out) or _pooled(sum_in, count_in) or alone or 1.0
    std_in = _pooled(sum_in, count_in) or std_out
    if not pooled:
        std_in, std_out = _own(sum_in, count_in, std_in), _own(sum_out, count_out, std_out)
    noise_in, noise_out = std_in**2 / np.maximum(count_in, 1), std_out**2 / np.maximum(count_out, 1)
    effect = float(effects[scored].mean()) if scored.any() else 0.0
    if spread is None:
        spread = _spread(effects[scored], (noise_in + noise_out)[scored])
    # Models that did not see a record know the level of those that did, less surely by the spread of the effect, and
    # the other way round.
    level_in, unsure_in = _merged(mean_in, noise_in, mean_out + effect, noise_out + spread**2)
    level_out, unsure_out = _merged(mean_out, noise_out, mean_in - effect, noise_in + spread**2)
    wide_in, wide_out = std_in**2 + unsure_in, std_out**2 + unsure_out
    with np.errstate(invalid="ignore"):
        far_in, far_out = (target - level_in) ** 2 / wide_in, (target - level_out) ** 2 / wide_out
        ratio = (far_out - far_in + np.log(wide_out / wide_in)) / 2
    return np.where(scored, ratio, -np.inf)


def offline(
    target: Float[np.ndarray, " n"],
    shadow: Float[np.ndarray, "models n"],
    inside: Bool[np.ndarray, "models n"] | None = None,
    *,
    pooled: bool | None = None,
) -> Float[np.ndarray, " n"]:
    """By how many standard deviations the target scores above the models that did not see the record.

    Arguments as in `online`; inside=None: no shadow model saw any record. One-sided: a record scored *below* its
    out models counts as no member, however far. The paper's P[Z <= z] orders records alike and saturates.

    Raises UserError for a record that every shadow model saw.
    """
    inside = np.zeros(shadow.shape, bool) if inside is None else inside
    scored = _check(target, shadow, inside)
    pooled = len(shadow) < POOL_BELOW if pooled is None else pooled
    mean, squares, count = _moments(shadow, ~inside & scored)
    _enough(count[scored], 1 if pooled else 2, "did not see")
    std = _pooled(squares, count) or 1.0
    if not pooled:
        std = _own(squares, count, std)
    with np.errstate(invalid="ignore"):
        return np.where(scored, (target - mean) / std, -np.inf)


def _moments(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sum of squared distances from it, and count of the chosen values of every column."""
    count = chosen.sum(axis=0)
    values = np.where(chosen, values, 0.0)
    mean = values.sum(axis=0) / np.maximum(count, 1)
    return mean, (np.where(chosen, values - mean, 0.0) ** 2).sum(axis=0), count


def _pooled(squares: np.ndarray, count: np.ndarray) -> float:
    """One standard deviation around the records' own means; 0 when nothing varies or nothing is left to vary."""
    freedom = np.maximum(count - 1, 0).sum()
    return float(np.sqrt(squares.sum() / freedom)) if freedom else 0.0


def _spread(effects: Float[np.ndarray, " n"], noise: Float[np.ndarray, " n"]) -> float:
    """Standard deviation of the true effects, from measured ones with noise of these variances."""
    return float(np.sqrt(max(effects.var() - noise.mean(), 0.0))) if len(effects) else 0.0


def _merged(one: np.ndarray, noise: np.ndarray, other: np.ndarray, other_noise: np.ndarray):
    """Two measurements of one value as one, weighted by how sure they are, and the variance of that."""
    sure, other_sure = 1 / noise, 1 / other_noise
    return (one * sure + other * other_sure) / (sure + other_sure), 1 / (sure + other_sure)


def _own(squares: np.ndarray, count: np.ndarray, pooled: float) -> np.ndarray:
    return np.maximum(np.sqrt(squares / np.maximum(count - 1, 1)), SMALLEST * pooled)


def _check(target: np.ndarray, shadow: np.ndarray, inside: np.ndarray) -> Bool[np.ndarray, " n"]:
    """The records with a score under the target; each then needs one under every shadow model."""
    if shadow.ndim != 2 or shadow.shape[1:] != target.shape or inside.shape != shadow.shape or inside.dtype != bool:
        raise UserError(
            "the likelihood-ratio attack needs every shadow model's score of every record",
            got=f"target {target.shape}, shadow {shadow.shape}, inside {inside.shape} of {inside.dtype}",
            wanted="(n,) and (models, n) numbers, (models, n) booleans",
        )
    scored = target != -np.inf
    if not (np.isfinite(target[scored]).all() and np.isfinite(shadow[:, scored]).all()):
        raise UserError("a record that the target scores has no finite score", wanted="the same records for all models")
    return scored


def _enough(count: np.ndarray, needed: int, what: str) -> None:
    if (count < needed).any():
        raise UserError(
            f"too few shadow models {what} a record",
            got=f"{int((count < needed).sum())} records with fewer than {needed}",
            fix="train more shadow models, on the halves that `halves` draws"
            + (", or pool the variance" if needed > 1 else ""),
        )

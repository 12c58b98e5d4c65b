"""Quantile-regression attack: does a record score higher than almost every unseen record like it would?

    score(x) = (s(x) - q_high(x)) / (q_high(x) - q_median(x))

q_high and q_median are quantiles of the score s given features of the record that involve no target model (its
length, how far it compresses, its loss under a public model), fitted on known non-members alone. Above 0: under
one in 1 / (1 - level) unseen records of that kind score so high. One model is trained, on no text: no shadow
models. Bertran, Tang, Kearns, Morgenstern, Roth, Wu: Scalable Membership Inference Attacks via Quantile
Regression, NeurIPS 2023 (arXiv:2307.03694).

The paper fits networks; here both quantiles are linear in the features and minimise the pinball loss (Koenker
and Bassett 1978), solved as a linear programme. What is not linear in the features stays in the score.

**Nothing is fitted to what it is used on.** Members and non-members alike are dealt into folds; a record of fold
j is measured by the quantiles fitted on the non-members of all other folds. Non-members measured by a fit that
saw them would look lower than they are, and members would seem to stand out where nothing was learned.
What is left: unseen records exceed a fitted quantile a little more often than its level says, members and
non-members alike (three coefficients on 320 records: 5.5% for 5%, 10.4% for 10%). Compare the sides, not 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linprog
from scipy.sparse import csr_array

from geoquant.errors import UserError
from geoquant.privacy.attacks import loss
from geoquant.privacy.attacks.pool import Sides, apart, pooled
from geoquant.privacy.evidence import Evidence

__all__ = ["LEAST", "fit_quantile", "highest_level", "joint", "predict", "score"]

FOLDS = 5
LEVEL = 0.95
LOWEST = 0.75
NARROWEST = 0.1  # share of the median spread: where the two lines come close or cross, the unit stops shrinking
LEAST = 100  # non-members: they carry LOWEST on three features
PER_COEFFICIENT = 5  # non-members above a quantile, or below, that a fitted coefficient should rest on


def joint(members: Evidence, nonmembers: Evidence) -> Sides:
    """By length (log tokens), compressibility (log bytes under zlib) and score under the reference model.

    The level is the highest, up to LEVEL, that the non-members can carry: 0.75 with 100 of them, 0.95 with 500.

    Raises UserError where a text's bytes or a reference are missing, or with fewer non-members than that.
    """
    sides = (members, nonmembers)
    if any(side.zlib_bytes is None or side.reference is None for side in sides):
        raise UserError("the quantile attack needs a reference model", fix="add --reference MODEL (the public base)")
    observed = pooled(members, nonmembers)
    rows = [(s.target.lengths, s.zlib_bytes, loss.score(Evidence(s.reference))) for s in sides]
    lengths, packed, base = (np.concatenate(parts) for parts in zip(*rows))
    features = np.column_stack([np.log(np.maximum(lengths, 1)), np.log(packed), base])
    nonmember = np.arange(len(observed)) >= len(members.target)
    level = highest_level(int(np.isfinite(observed[nonmember]).sum()), features.shape[1])
    return apart(score(observed, features, nonmember, level=level), members)


def highest_level(nonmembers: int, features: int, *, folds: int = FOLDS) -> float:
    """The highest quantile, up to LEVEL, that so many non-members can carry.

    Raises UserError below LOWEST: a quantile near the median says little about who stands out.
    """
    wanted = PER_COEFFICIENT * (features + 1) * folds / (folds - 1)
    if nonmembers * (1 - LOWEST) < wanted:
        raise UserError(
            f"too few non-members for a quantile regression on {features} features",
            got=nonmembers,
            wanted=f"at least {int(np.ceil(wanted / (1 - LOWEST)))}",
        )
    return min(LEVEL, 1 - wanted / nonmembers)


def score(
    observed: Float[np.ndarray, " n"],
    features: Float[np.ndarray, "n features"],
    nonmember: Bool[np.ndarray, " n"],
    *,
    level: float = LEVEL,
    folds: int = FOLDS,
    seed: int = 0,
) -> Float[np.ndarray, " n"]:
    """How far every record lies above its predicted quantile, in spreads of its kind; higher = more likely a member.

    observed: score under the target (mean log-probability; higher = more likely a member). features: one row a
    record, without a constant; a column that does not vary is harmless. nonmember: which records are known to be
    unseen; only they are fitted to. A record with observed score -inf keeps it and is not fitted to.

    Raises UserError for features that are not finite or non-members too few for the level.
    """
    n = len(observed)
    if observed.shape != (n,) or features.ndim != 2 or len(features) != n or nonmember.shape != (n,):
        raise UserError(
            "the quantile attack needs one row of features for each record",
            got=f"scores {observed.shape}, features {features.shape}, non-members {nonmember.shape}",
        )
    scored = np.isfinite(observed)
    if not np.isfinite(features[scored]).all():
        raise UserError("a feature of a record is not a finite number")
    if not 0.5 < level < 1:
        raise UserError("the quantile attack asks for a high quantile", got=level, wanted="0.5 < level < 1")
    usable = np.flatnonzero(scored & nonmember)
    tail = (1 - level) * len(usable) * (folds - 1) / folds
    wanted = PER_COEFFICIENT * (features.shape[1] + 1)
    if folds < 2 or tail < wanted - 1e-9:
        raise UserError(
            f"too few non-members to fit the {level:g} quantile on {features.shape[1]} features",
            got=f"{len(usable)} in {folds} folds",
            wanted=f"at least {int(np.ceil(wanted / (1 - level) * folds / max(folds - 1, 1)))}",
            fix="give more non-members, fewer features or a lower level",
        )
    fold = np.empty(n, np.int64)
    rng = np.random.default_rng(seed)
    for side in (usable, np.setdiff1d(np.arange(n), usable)):
        fold[rng.permutation(side)] = np.arange(len(side)) % folds
    values = np.full(n, -np.inf)
    for number in range(folds):
        fitted = usable[fold[usable] != number]
        held = np.flatnonzero(scored & (fold == number))
        middle, high = (fit_quantile(features[fitted], observed[fitted], at) for at in (0.5, level))
        spread_seen = predict(high, features[fitted]) - predict(middle, features[fitted])
        narrowest = NARROWEST * max(float(np.median(spread_seen)), 0.0) or 1.0
        top = predict(high, features[held])
        spread = np.maximum(top - predict(middle, features[held]), narrowest)
        values[held] = (observed[held] - top) / spread
    return values


def fit_quantile(
    features: Float[np.ndarray, "n features"], values: Float[np.ndarray, " n"], level: float
) -> Float[np.ndarray, " features+1"]:
    """Constant and slopes of the linear quantile: argmin_b sum_i rho(values_i - b_0 - features_i b),

    with rho(u) = level u for u >= 0 and (level - 1) u below. Solved exactly.
    """
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-9 * (np.abs(mean) + 1e-9), std, np.inf)  # a column that does not vary gets slope 0
    design = np.column_stack([np.ones(len(values)), (features - mean) / std])
    center, unit = float(np.median(values)), float(np.std(values)) or 1.0
    # The dual has one bounded variable a record and one equation a coefficient (the primal n inequalities):
    # max y.d with design^T d = (1 - level) design^T 1, 0 <= d <= 1; the coefficients are its multipliers.
    answer = linprog(
        -(values - center) / unit,
        A_eq=csr_array(design.T),
        b_eq=(1 - level) * design.sum(axis=0),
        bounds=(0, 1),
        method="highs",
    )
    if answer.status != 0:
        raise UserError("the quantile regression was not solved", got=answer.message)
    slopes = -answer.eqlin.marginals * unit
    slopes[1:] /= std
    slopes[0] += center - mean @ slopes[1:]
    return slopes


def predict(
    coefficients: Float[np.ndarray, " features+1"], features: Float[np.ndarray, "n features"]
) -> Float[np.ndarray, " n"]:
    """The quantile that `fit_quantile` found, for these records."""
    return coefficients[0] + features @ coefficients[1:]

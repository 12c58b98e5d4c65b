"""RMIA: how many records of the population does this record dominate, once each is measured against references?

    ratio(x) = p(x | target) / p(x)
    score(x) = P_z [ ratio(x) / ratio(z) >= gamma ],    z from the population, unseen by the target

Zarifzadeh, Liu, Shokri: Low-Cost High-Power Membership Inference Attacks, ICML 2024 (arXiv:2312.03262). Offline
form: p(x), the mean over models that saw x and models that did not, is taken from the latter alone by the
paper's line p_in = a p_out + (1 - a), so that

    p(x) = ((1 + a) p_out(x) + 1 - a) / 2,    p_out = mean over the reference models that did not see x.

a = 1: training does not move a record, p(x) = p_out(x). a = 0: every trained record is known by heart.
`fit_slope` fits a from reference models that saw some records. Online form, where half of the reference models saw x:
p(x) is the mean over all of them, and no line is needed.

**Probabilities** are geometric means over a record's tokens, exp(mean log-probability); products over a whole
text would make every ratio depend on its length above all. Language models give most texts small p, and there
the constant 1 - a would outweigh p_out and with it the calibration: the default is a = 1, and an a that was fitted
on images (the paper's 0.3 and the like) does not carry over.

**What the population adds.** The score is a rising function of ratio(x), the same for all records: it orders
them as ratio(x) does and makes the threshold mean the same for every model (the share of the population
dominated), but it separates no better. It resolves no more than m + 1 values, and gamma > 1 ties the records
below the population's spread at 0, which costs AUC: the default is gamma = 1. The population must not
overlap the records that are scored. In an audit (`joint`) it is the non-members; each meets itself there, which counts
half, as any tie: counted whole it would lift one side, left out it would tie the highest non-member with all above it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp

from geoquant.errors import UserError
from geoquant.privacy.attacks.pool import Sides, apart, pooled, pooled_shadows
from geoquant.privacy.evidence import Evidence

__all__ = ["fit_slope", "joint", "log_ratio", "score"]


def score(
    target: Float[np.ndarray, " n"],
    reference: Float[np.ndarray, "models n"],
    population_target: Float[np.ndarray, " m"],
    population_reference: Float[np.ndarray, "models m"],
    *,
    outside: Bool[np.ndarray, "models n"] | None = None,
    gamma: float = 1.0,
    slope: float = 1.0,
) -> Float[np.ndarray, " n"]:
    """Share of the population that each record dominates, in [0, 1]; O((n + m) log m).

    target, reference: mean log-probability per token (nats) of the records under the target and the reference
    models; population_*: the same of records that none of them saw. outside: which reference models did not see
    a record (None: none did). gamma: by which factor a record must dominate. slope: the a above. A record with
    target score -inf keeps it; such records of the population are left out.

    Raises UserError for an empty population, or a record that every reference model saw.
    """
    if not gamma > 0:
        raise UserError("gamma is a factor", got=gamma, wanted="gamma > 0")
    population = log_ratio(population_target, population_reference, slope=slope)
    population = np.sort(population[population > -np.inf])
    if not len(population):
        raise UserError("RMIA needs population records that none of the models saw", got="none with a score")
    ratio = log_ratio(target, reference, outside=outside, slope=slope)
    return np.where(ratio > -np.inf, _dominated(ratio, population, gamma) / len(population), -np.inf)


def joint(members: Evidence, nonmembers: Evidence) -> Sides:
    """Share of the non-members that each record dominates, with p(x) over all shadow models and gamma 1.

    Each shadow was trained on half of both sides, so that p(x) means the same for every record, member or not.

    Raises UserError without shadow models.
    """
    shadows = pooled_shadows(members, nonmembers)
    inside, outside = apart(log_ratio(pooled(members, nonmembers), shadows.mean_log_prob), members)
    population = np.sort(outside[outside > -np.inf])
    if not len(population):
        raise UserError("RMIA needs non-members to compare with", got="none with a score")
    return tuple(
        np.where(ratio > -np.inf, (_dominated(ratio, population, 1.0) - itself) / len(population), -np.inf)
        for ratio, itself in ((inside, 0.0), (outside, 0.5))
    )


def log_ratio(
    target: Float[np.ndarray, " n"],
    reference: Float[np.ndarray, "models n"],
    *,
    outside: Bool[np.ndarray, "models n"] | None = None,
    slope: float = 1.0,
) -> Float[np.ndarray, " n"]:
    """log [p(x | target) / p(x)], nats per token; -inf for a record without scored tokens."""
    _check(target, reference, outside)
    if not 0 <= slope <= 1:
        raise UserError("the slope a of p_in = a p_out + 1 - a lies between 0 and 1", got=slope)
    scored = target > -np.inf
    outside = np.ones(reference.shape, bool) if outside is None else outside
    count = outside.sum(axis=0)
    if (count[scored] == 0).any():
        raise UserError(
            "RMIA needs for every record a reference model that did not see it",
            got=f"{int((count[scored] == 0).sum())} records that all have seen",
        )
    # Log-mean-exp: a hard text's probability per token may underflow, its logarithm does not.
    usable = outside & scored
    log_out = logsumexp(np.where(usable, reference, 0.0), axis=0, b=np.where(usable.any(axis=0), usable, 1))
    log_out = log_out - np.log(np.maximum(count, 1))
    with np.errstate(divide="ignore"):
        evidence = np.logaddexp(np.log((1 + slope) / 2) + log_out, np.log((1 - slope) / 2))
    return np.where(scored, target - evidence, -np.inf)


def _dominated(ratio: Float[np.ndarray, " n"], population: Float[np.ndarray, " m"], gamma: float) -> np.ndarray:
    """How many of the population (sorted log-ratios) each record dominates."""
    return np.searchsorted(population, ratio - np.log(gamma), side="right")


def fit_slope(log_in: Float[np.ndarray, " pairs"], log_out: Float[np.ndarray, " pairs"]) -> float:
    """Least-squares a of p_in = a p_out + (1 - a), a line through (1, 1), clipped to [0, 1].

    log_in, log_out: mean log-probabilities of the same records under a reference model that saw them and one that
    did not. No score of the target enters, so that nothing is fitted to what is attacked.
    """
    missing_in, missing_out = -np.expm1(log_in), -np.expm1(log_out)
    weight = float((missing_out**2).sum())
    if not weight > 0:
        raise UserError("the slope cannot be fitted", got="records that are all predicted with certainty, or none")
    return float(np.clip((missing_out * missing_in).sum() / weight, 0.0, 1.0))


def _check(target: np.ndarray, reference: np.ndarray, outside: np.ndarray | None) -> None:
    fits = reference.ndim == 2 and len(reference) and reference.shape[1:] == target.shape
    if not fits or (outside is not None and outside.shape != reference.shape):
        raise UserError(
            "RMIA needs every reference model's score of every record",
            got=f"target {target.shape}, reference {reference.shape}",
            wanted="(n,) and (models, n), and a mask of the latter's shape",
        )
    scored = target != -np.inf
    if (target[scored] > 0).any() or not (np.isfinite(reference[:, scored]) & (reference[:, scored] <= 0)).all():
        raise UserError("RMIA needs log-probabilities", wanted="finite numbers of at most 0")

"""Statistics against counting by hand, scikit-learn, and the coverage that an interval promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from geoquant.privacy.statistics import auc, auc_interval, clopper_pearson, roc_points, tpr_at_fpr

samples = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12).map(np.array)


@settings(deadline=None)
@given(samples, samples)
def test_auc_counts_pairs(members, nonmembers):
    wins = sum((m > n) + 0.5 * (m == n) for m in members for n in nonmembers)
    assert auc(members, nonmembers) == pytest.approx(wins / (len(members) * len(nonmembers)))
    assert auc(nonmembers, members) == pytest.approx(1 - auc(members, nonmembers))


def test_auc_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(0.7, 1, 80).round(1), rng.normal(0, 1, 130).round(1)
    labels = np.repeat([1, 0], [80, 130])
    assert auc(members, nonmembers) == pytest.approx(roc_auc_score(labels, np.concatenate([members, nonmembers])))


@settings(deadline=None)
@given(samples, samples, st.floats(0, 1))
def test_tpr_is_the_best_threshold_that_respects_the_rate(members, nonmembers, fpr):
    thresholds = [-np.inf, *members, *nonmembers]
    allowed = [t for t in thresholds if (nonmembers > t).mean() <= fpr + 1e-9]
    best = max((members > t).mean() for t in allowed)
    tpr, (low, high) = tpr_at_fpr(members, nonmembers, fpr)
    assert tpr == pytest.approx(best)
    assert low <= tpr <= high


def test_tpr_counts_exactly_the_allowed_share():
    nonmembers = np.arange(100.0)
    assert tpr_at_fpr(np.array([98.5, 99.5, 97.5]), nonmembers, 0.01)[0] == pytest.approx(2 / 3)
    assert tpr_at_fpr(np.array([98.5, 99.5, 97.5]), nonmembers[:99] + 1, 0.01)[0] == pytest.approx(1 / 3)
    assert tpr_at_fpr(np.array([71.0]), np.arange(100.0), 0.29)[0] == 1.0  # 0.29 * 100 < 29 in floating point


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 150)])
def test_clopper_pearson_inverts_the_binomial_tails(k, n):
    low, high = clopper_pearson(k, n)
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(0.025)
    else:
        assert high == 1
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_seeded_and_matches_explicit_resampling():
    rng = np.random.default_rng(1)
    members, nonmembers = rng.normal(0.8, 1, 60), rng.normal(0, 1, 50)
    interval = auc_interval(members, nonmembers, seed=3)
    assert interval == auc_interval(members, nonmembers, seed=3)
    assert interval != auc_interval(members, nonmembers, seed=4)
    explicit = [auc(rng.choice(members, 60), rng.choice(nonmembers, 50)) for _ in range(2000)]
    np.testing.assert_allclose(interval, np.quantile(explicit, [0.025, 0.975]), atol=0.012)


def test_bootstrap_covers_the_true_auc_about_as_often_as_it_says():
    from scipy.stats import norm

    truth = norm.cdf(1 / np.sqrt(2))  # two unit normals one apart
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(150):
        low, high = auc_interval(rng.normal(1, 1, 60), rng.normal(0, 1, 60), resamples=200, seed=trial)
        hits += low <= truth <= high
    assert 0.89 <= hits / 150 <= 0.99


def test_memory_chunks_do_not_change_what_is_resampled(monkeypatch):
    rng = np.random.default_rng(5)
    members, nonmembers = rng.normal(1, 1, 30), rng.normal(0, 1, 30)
    whole = auc_interval(members, nonmembers, resamples=500)
    monkeypatch.setattr("geoquant.privacy.statistics.RESAMPLE_ELEMENTS", 60 * 100)
    assert auc_interval(members, nonmembers, resamples=500) == pytest.approx(whole, abs=0.03)


def test_perfect_separation_is_not_certainty():
    low, high = auc_interval(np.ones(150), np.zeros(150))
    assert high == 1
    assert low == pytest.approx(0.025 ** (1 / 150))
    assert auc_interval(np.zeros(20), np.ones(30)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))


@settings(deadline=None)
@given(samples, samples)
def test_roc_corners_enclose_the_auc(members, nonmembers):
    fpr, tpr = roc_points(members, nonmembers, points=1000)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(fpr) >= 0)
    assert np.all(np.diff(tpr) >= 0)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auc(members, nonmembers))


def test_roc_is_thinned_to_few_points():
    rng = np.random.default_rng(0)
    fpr, tpr = roc_points(rng.normal(0.2, 1, 2000), rng.normal(0, 1, 2000), points=50)
    assert len(fpr) <= 50
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)

"""Statistics against counting by hand, scikit-learn, and the coverage that an interval promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest, norm
from sklearn.metrics import roc_auc_score

from geoquant.privacy.statistics import (
    auc,
    auc_interval,
    chance_p,
    clopper_pearson,
    guessed_right,
    holm,
    needed,
    realised_fpr,
    roc_points,
    tpr_at_fpr,
)

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


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.9])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(rate):
    rng = np.random.default_rng(4)
    found = [clopper_pearson(int(k), 60) for k in rng.binomial(60, rate, 2000)]
    assert np.mean([low <= rate <= high for low, high in found]) >= 0.945  # 95% less a standard error of 2000


def test_how_many_nonmembers_a_rate_needs():
    assert [needed(rate) for rate in (0.1, 0.01, 0.001, 0.29)] == [10, 100, 1000, 4]
    for rate in (0.1, 0.01, 0.001):
        assert int(rate * needed(rate) + 1e-9) == 1  # one may be accused; with one record less, none
        assert int(rate * (needed(rate) - 1) + 1e-9) == 0


@pytest.mark.parametrize(("fpr", "m"), [(0.1, 50), (0.01, 100), (0.01, 1000)])
def test_the_true_rate_of_the_threshold_lies_where_it_is_said_to(fpr, m):
    """The threshold that tpr_at_fpr takes, against the known distribution of the scores."""
    rng = np.random.default_rng(8)
    low, high = realised_fpr(fpr, m)
    rates = [norm.sf(np.sort(rng.normal(size=m))[::-1][int(fpr * m)]) for _ in range(2000)]
    assert abs(np.mean([low <= rate <= high for rate in rates]) - 0.95) < 0.015


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8])
def test_the_p_value_of_chance_is_that_of_relabeling(shift):
    rng = np.random.default_rng(10)
    members, nonmembers = rng.normal(shift, 1, 25).round(1), rng.normal(0, 1, 35).round(1)
    pool, far = np.concatenate([members, nonmembers]), abs(auc(members, nonmembers) - 0.5)
    relabeled = [rng.permutation(60) for _ in range(4000)]
    slow = np.mean([abs(auc(pool[order[:25]], pool[order[25:]]) - 0.5) >= far - 1e-12 for order in relabeled])
    assert chance_p(members, nonmembers) == pytest.approx(slow, abs=0.02)


def test_equal_scores_are_no_evidence():
    assert chance_p(np.zeros(12), np.zeros(15)) == 1.0


def test_the_p_value_of_chance_is_uniform_under_chance():
    rng = np.random.default_rng(9)
    p = [chance_p(rng.normal(size=50), rng.normal(size=70)) for _ in range(1000)]
    assert kstest(p, "uniform").pvalue > 0.01


def test_holm_by_hand():
    """Four tests: 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, which may not fall below 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3, 0.9, 0.5]) == pytest.approx([0.9, 1.0, 1.0])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_keeps_the_order_and_never_lowers(p):
    corrected = holm(p)
    assert all(a >= b for a, b in zip(corrected, p, strict=True))
    assert max(corrected) <= 1
    ordered = [corrected[i] for i in np.argsort(p, kind="stable")]
    assert ordered == sorted(ordered)
    # Rejecting what is at most a gives the step-down procedure: stop at the first p above a / (tests left).
    for level in (0.01, 0.05, 0.5):
        count = 0
        for left, value in zip(range(len(p), 0, -1), sorted(p), strict=True):
            if left * value > level:
                break
            count += 1
        assert sum(value <= level for value in corrected) == count


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


def test_right_guesses_are_those_of_the_other_half():
    """Against every threshold and both directions tried one by one on each half."""
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.8, -1.5):
        inside, outside = generator.normal(shift, 1, 31).round(1), generator.normal(0, 1, 24).round(1)
        right = np.zeros(2)
        for half in (0, 1):
            best = (-1.0, 0, 0.0)
            for sign in (1, -1):
                for at in sorted({*(sign * inside[half::2]), *(sign * outside[half::2])}):
                    gain = (sign * inside[half::2] >= at).mean() + (sign * outside[half::2] < at).mean()
                    best = (gain, sign, at) if gain > best[0] + 1e-12 else best
            _, sign, at = best
            right += (sign * inside[1 - half :: 2] >= at).sum(), (sign * outside[1 - half :: 2] < at).sum()
        share, error = guessed_right(inside, outside)
        assert share == pytest.approx((right / (31, 24)).mean())
        rates = right / (31, 24)
        assert error == pytest.approx(0.5 * np.sqrt((rates * (1 - rates) / (31, 24)).sum()))


def test_right_guesses_at_chance_are_half():
    """600 draws of scores that say nothing: a mean within 4 of its standard errors; where it was chosen it is above."""
    generator = np.random.default_rng(0)
    found = [guessed_right(*generator.normal(size=(2, 20)))[0] for _ in range(600)]
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / 600**0.5
    assert guessed_right(np.ones(4), np.zeros(4)) == guessed_right(np.zeros(4), np.ones(4)) == (1.0, 0.0)
    assert guessed_right(np.ones(1), np.zeros(4)) is None

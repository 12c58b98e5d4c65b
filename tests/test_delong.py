"""DeLong against placements counted pair by pair, hand-worked fractions, and the error rates that it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from geoquant.privacy.delong import delong_interval, paired_difference, placements
from geoquant.privacy.statistics import auc

samples = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=9).map(np.array)


def brute(members, nonmembers):
    """Placements by comparing every pair."""
    wins = (members[:, None] > nonmembers) + 0.5 * (members[:, None] == nonmembers)
    return wins.mean(1), wins.mean(0)


def brute_variance(first, second=None):
    """DeLong's variance by its double sums over pairs, of an AUC or of the difference of two."""
    inside, outside = brute(*first)
    if second is not None:
        inside, outside = (b - a for a, b in zip((inside, outside), brute(*second), strict=True))
    mean = inside.mean()
    return sum(((part - mean) ** 2).sum() / (len(part) - 1) / len(part) for part in (inside, outside))


@settings(deadline=None)
@given(samples, samples)
def test_placements_count_pairs(members, nonmembers):
    for fast, slow in zip(placements(members, nonmembers), brute(members, nonmembers), strict=True):
        np.testing.assert_allclose(fast, slow, atol=1e-12)
        assert fast.mean() == pytest.approx(auc(members, nonmembers))


def test_a_small_example_worked_by_hand():
    """Placements 1, 2/3, 2/3 and 1/3, 1, 1: AUC 7/9, variance (1/27)/3 + (4/27)/3 = 5/81."""
    members, nonmembers = np.array([0.8, 0.6, 0.4]), np.array([0.7, 0.3, 0.2])
    low, high = delong_interval(members, nonmembers)
    half = norm.ppf(0.975) * np.sqrt(5 / 81) / (7 / 9 * 2 / 9)
    odds = np.exp([np.log(3.5) - half, np.log(3.5) + half])
    assert (low, high) == pytest.approx(tuple(odds / (1 + odds)))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6))
def test_the_difference_is_that_of_the_double_sums(n, m, seed):
    rng = np.random.default_rng(seed)
    first, second = ((rng.integers(0, 5, n).astype(float), rng.integers(0, 5, m).astype(float)) for _ in range(2))
    found, variance = paired_difference(first, second), brute_variance(first, second)
    assert found.value == pytest.approx(auc(*second) - auc(*first))
    if variance > 1e-12:
        assert found.z == pytest.approx(found.value / np.sqrt(variance))
        assert found.p == pytest.approx(2 * norm.sf(abs(found.z)))
        assert found.ci[0] <= found.value <= found.ci[1]
    other = paired_difference(second, first)
    assert (other.value, other.p) == pytest.approx((-found.value, found.p))
    assert other.ci == pytest.approx((-found.ci[1], -found.ci[0]))


def test_the_variance_agrees_with_scikit_learns_auc_under_jackknife():
    """The jackknife of an independent AUC estimates the same variance."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(3)
    members, nonmembers = rng.normal(0.8, 1, 60), rng.normal(0, 1, 90)
    labels = np.repeat([1, 0], [60, 90])
    scores = np.concatenate([members, nonmembers])
    left = np.array([roc_auc_score(np.delete(labels, i), np.delete(scores, i)) for i in range(150)])
    jackknife = sum((k - 1) / k * ((part - part.mean()) ** 2).sum() for k, part in ((60, left[:60]), (90, left[60:])))
    low, high = delong_interval(members, nonmembers)
    value = auc(members, nonmembers)
    width = (np.log(high / (1 - high)) - np.log(low / (1 - low))) * value * (1 - value) / (2 * norm.ppf(0.975))
    assert width == pytest.approx(np.sqrt(jackknife), rel=0.02)


@pytest.mark.parametrize(("shift", "n", "m"), [(0.0, 40, 40), (1.0, 60, 30), (2.5, 100, 100)])
def test_the_interval_covers_as_often_as_it_says(shift, n, m):
    """95% intervals of 1000 draws: 93 to 97.5% hold the truth, three standard errors of a rate of 1000 and some."""
    truth, rng = norm.cdf(shift / np.sqrt(2)), np.random.default_rng(11)
    found = [delong_interval(rng.normal(shift, 1, n), rng.normal(0, 1, m)) for _ in range(1000)]
    assert 0.93 <= np.mean([low <= truth <= high for low, high in found]) <= 0.975


def two_models(rng, n, shift, alike):
    """Scores of n + n records under two models of equal AUC that agree on what is easy (correlation `alike`)."""
    sides = []
    for mean in (shift, 0.0):
        common = rng.normal(0, np.sqrt(alike), n)
        sides.append([mean + common + rng.normal(0, np.sqrt(1 - alike), n) for _ in range(2)])
    return tuple(zip(*sides, strict=True))


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_the_paired_test_is_calibrated_under_no_difference(alike):
    """p-values of 1500 pairs of equally good models are uniform, and 5% of them lie below 0.05 (within 1.7)."""
    rng = np.random.default_rng(5)
    p = np.array([paired_difference(*two_models(rng, 80, 0.8, alike)).p for _ in range(1500)])
    assert kstest(p, "uniform").pvalue > 0.01
    assert abs((p < 0.05).mean() - 0.05) < 0.017


def test_pairing_is_worth_what_the_records_share():
    """Independent models: the unpaired variance. Models that agree: a much smaller one."""
    rng = np.random.default_rng(6)
    for alike, low, high in ((0.0, 0.85, 1.15), (0.95, 0.0, 0.4)):
        first, second = two_models(rng, 400, 0.7, alike)
        found = paired_difference(first, second)
        paired = ((found.ci[1] - found.ci[0]) / (2 * norm.ppf(0.975))) ** 2
        assert low <= paired / (brute_variance(first) + brute_variance(second)) <= high


def test_no_variance_is_not_certainty():
    ones, zeros = np.ones(150), np.zeros(150)
    assert delong_interval(ones, zeros) == (pytest.approx(0.025 ** (1 / 150)), 1.0)
    assert delong_interval(np.zeros(20), np.ones(30)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    low, high = delong_interval(np.zeros(20), np.zeros(30))
    assert (low + high) / 2 == 0.5
    assert high - low == pytest.approx(1 - 0.025 ** (1 / 20))
    same = paired_difference((ones, zeros), (2 * ones, zeros))
    assert (same.value, same.z, same.p) == (0.0, None, 1.0)
    assert same.ci[0] < 0 < same.ci[1]
    turned = paired_difference((np.zeros(10), np.ones(10)), (np.ones(10), np.zeros(10)))
    assert (turned.value, turned.z) == (1.0, None)
    assert turned.p == pytest.approx(2 * 0.5**10)  # ten fair coins that all fall alike


def test_a_record_without_a_score_ranks_last():
    members = np.array([1.0, -np.inf, 2.0])
    low, high = delong_interval(members, np.array([0.5, -np.inf, -np.inf]))
    assert 0 <= low < auc(members, np.array([0.5, -np.inf, -np.inf])) < high <= 1

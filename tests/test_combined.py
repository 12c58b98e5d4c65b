"""The combination: its fit against scikit-learn, its error rates where nothing is to be found, its gain else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm
from sklearn.linear_model import LogisticRegression

from geoquant.errors import UserError
from geoquant.privacy.attacks.combined import WIDENING, fit_logistic, permutation_p_value, score
from geoquant.privacy.statistics import auc


def split_auc(scores, member) -> float:
    return auc(scores[member], scores[~member])


def pool(seed, gains, n=400, common=1.0):
    """n records, half members; attacks share a common part (how easy the record is) and gain `gains` for members."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(n) < n // 2
    scores = common * rng.normal(size=(n, 1)) + rng.normal(size=(n, len(gains))) + np.outer(member, gains)
    return scores, member


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_the_fit_is_penalised_logistic_regression(penalty):
    scores, member = pool(0, [1.0, 0.3, -0.5], n=150)
    found = fit_logistic(scores, member, penalty)
    wanted = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10000).fit(scores, member)
    np.testing.assert_allclose(found, [*wanted.intercept_, *wanted.coef_[0]], atol=1e-5)


def test_separable_records_have_finite_weights():
    x = np.concatenate([np.full(20, -1e3), np.full(20, 1e3)])[:, None]
    found = fit_logistic(x, x[:, 0] > 0, 1e-3)
    assert np.isfinite(found).all()
    assert found[1] > 0


@pytest.mark.parametrize("attacks", [1, 4])
def test_where_nothing_is_to_be_found_the_widened_interval_holds_one_half(attacks):
    n, runs = 200, 100
    values = []
    for seed in range(runs):
        scores, member = pool(seed, np.zeros(attacks), n)
        values.append(split_auc(score(scores, member, seed=seed), member))
    values = np.array(values)
    error = np.sqrt((n + 1) / (3 * n * n))  # of a fixed score's AUC, n / 2 records a side
    # Unbiased: within the mean of 100 runs' own standard error.
    assert values.mean() == pytest.approx(0.5, abs=4 * np.sqrt(2) * error / np.sqrt(runs))
    outside = np.abs(values - 0.5) > norm.ppf(0.975) * WIDENING * error
    assert outside.sum() <= binom.ppf(0.999, runs, 0.05)
    # What the widening is for: fitted to each other, folds spread more than a fixed score would.
    assert 1.1 < values.std() / error < 1.75


def test_the_permutation_test_errs_as_often_as_it_says():
    runs = 60
    found = [permutation_p_value(*pool(s, [0.0, 0.0], n=60), permutations=19, seed=s) for s in range(runs)]
    for level in (0.05, 0.2, 0.5):
        low, high = binom.ppf([0.0005, 0.9995], runs, level)
        assert low <= sum(p <= level + 1e-9 for p in found) <= high
    assert permutation_p_value(*pool(0, [1.5, 0.0], n=100), permutations=39) == 1 / 40


def test_raw_outputs_pooled_over_folds_would_be_biased():
    # The mistake that ranks prevent: leave one record out, pool raw values. Its absence tilts the fit against it.
    raw, ranked = [], []
    for seed in range(100):
        scores, member = pool(seed, [0.0], n=40, common=0.0)
        fold = np.arange(40)
        values = np.empty(40)
        for number in range(40):
            held = fold == number
            weights = fit_logistic(scores[~held], member[~held], 1.0)
            values[held] = weights[0] + scores[held] @ weights[1:]
        raw.append(split_auc(values, member))
        ranked.append(split_auc(score(scores, member, seed=seed), member))
    assert np.mean(raw) < 0.4
    assert np.mean(ranked) == pytest.approx(0.5, abs=4 * 0.14 / 10)


@pytest.mark.parametrize("seed", range(3))
def test_one_informative_attack_among_others_is_kept(seed):
    scores, member = pool(seed, [2.0, 0.0, 0.0], n=1000, common=0.0)
    best = split_auc(scores[:, 0], member)
    assert split_auc(score(scores[:, :1], member), member) == pytest.approx(best, abs=0.01)
    assert split_auc(score(scores, member), member) > best - 0.01


@pytest.mark.parametrize("seed", range(3))
def test_complementary_attacks_are_better_than_either(seed):
    # Two independent signals: together sqrt(2) times as far apart.
    scores, member = pool(seed, [1.0, 1.0], n=1000, common=0.0)
    alone = max(split_auc(column, member) for column in scores.T)
    both = split_auc(score(scores, member), member)
    assert both > alone + 0.04
    assert both == pytest.approx(norm.cdf(1.0), abs=0.05)
    # An uninformative attack that knows how easy a record is: its weight must be negative.
    scores, member = pool(seed, [1.0, 0.0], n=1000, common=3.0)
    assert split_auc(score(scores, member), member) > split_auc(scores[:, 0], member) + 0.06


def test_it_is_seeded_and_wild_or_missing_scores_do_no_harm():
    scores, member = pool(1, [2.0, 0.5])
    found = score(scores, member, seed=3)
    np.testing.assert_array_equal(found, score(scores, member, seed=3))
    assert not np.array_equal(found, score(scores, member, seed=4))
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_allclose(found, score(scores * [1e6, 1e-6] + 5, member, seed=3))
    scores[0] = [-np.inf, 1.0]
    scores[1, 0] = 1e30
    wild = score(scores, member)
    assert wild[0] == -np.inf
    assert np.isfinite(wild[1:]).all()
    assert split_auc(wild[1:], member[1:]) > 0.75
    constant = np.column_stack([scores[1:, 1], np.ones(len(scores) - 1)])
    assert np.isfinite(score(constant, member[1:])).all()


def test_mistakes_are_named():
    scores, member = pool(0, [1.0], n=40)
    with pytest.raises(UserError, match="every attack's score"):
        score(scores[:, 0], member)
    with pytest.raises(UserError, match=r"too few records.*\(10\)"):
        score(scores[:15], np.arange(15) < 8)

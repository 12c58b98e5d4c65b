"""Quantile regression against scikit-learn and its promised coverage; the attack where difficulty is explained."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import QuantileRegressor

from geoquant.errors import UserError
from geoquant.privacy.attacks.quantile import fit_quantile, predict, score
from geoquant.privacy.statistics import auc, tpr_at_fpr


def pool(seed, n=1200, effect=1.0):
    """Records whose difficulty and spread their features explain; a third are members, who gain `effect` spreads."""
    rng = np.random.default_rng(seed)
    features = np.column_stack([rng.normal(4, 1, n), rng.gamma(3, 1, n)])  # think: log length, reference loss
    spread = 0.2 + 0.2 * features[:, 1]
    member = rng.permutation(n) < n // 3
    observed = 0.5 * features[:, 0] - 2 * features[:, 1] + spread * (rng.normal(size=n) + effect * member)
    return observed, features, member


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_the_fit_is_the_minimum_of_the_pinball_loss(level):
    observed, features, _ = pool(0, n=400)
    found = fit_quantile(features, observed, level)
    wanted = QuantileRegressor(quantile=level, alpha=0, solver="highs").fit(features, observed)
    np.testing.assert_allclose(found, [wanted.intercept_, *wanted.coef_], rtol=1e-6, atol=1e-8)
    left = observed - predict(found, features)
    # Exactly as many records above as the level says, but for the coefficients' own (they lie on the plane).
    assert abs((left > 1e-9).sum() - (1 - level) * 400) <= 3


def test_a_constant_or_huge_feature_does_no_harm():
    observed, features, _ = pool(1, n=300)
    plain = predict(fit_quantile(features, observed, 0.9), features)
    odd = np.column_stack([features[:, 0] * 1e6 + 1e9, np.full(300, 7.0), features[:, 1]])
    np.testing.assert_allclose(predict(fit_quantile(odd, observed, 0.9), odd), plain, atol=1e-5)
    np.testing.assert_allclose(fit_quantile(np.zeros((300, 1)), observed, 0.5)[0], np.median(observed), atol=0.2)
    np.testing.assert_allclose(fit_quantile(np.zeros((5, 1)), np.full(5, 3.0), 0.9), [3, 0])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_unseen_records_exceed_the_quantile_as_often_as_stated(level):
    # 20 pools of 400 non-members in 5 folds; a fit of 3 coefficients on 320 is off by at most about 3 / 320.
    exceeded = 0
    for seed in range(20):
        observed, features, _ = pool(seed, n=400, effect=0.0)
        exceeded += int((score(observed, features, np.ones(400, bool), level=level, seed=seed) > 0).sum())
    low, high = binom.ppf([0.0005, 0.9995], 8000, 1 - level)
    slack = 8000 * 3 / 320 / 2
    assert low - slack <= exceeded <= high + slack


def test_records_treated_as_members_but_unseen_exceed_it_as_often():
    # The held-out half is never fitted to, like members: the same coverage for both halves.
    rates = []
    for seed in range(20):
        observed, features, _ = pool(seed, n=800, effect=0.0)
        half = np.arange(800) < 400
        found = score(observed, features, half, level=0.9, seed=seed)
        rates.append([(found[half] > 0).mean(), (found[~half] > 0).mean(), auc(found[~half], found[half])])
    inside, outside, separated = np.mean(rates, axis=0)
    error = np.sqrt(0.09 / 8000)
    assert inside == pytest.approx(0.1, abs=4 * error + 3 / 320 / 2)
    assert outside == pytest.approx(inside, abs=4 * np.sqrt(2) * error)
    assert separated == pytest.approx(0.5, abs=4 * 0.0204 / np.sqrt(20))


def test_measuring_records_by_a_fit_that_saw_them_would_invent_a_signal():
    # The mistake that the folds prevent, made on purpose: nothing to learn, yet "members" exceed more often.
    rng = np.random.default_rng(0)
    invented = []
    for _ in range(20):
        observed, features = rng.normal(size=300), rng.normal(size=(300, 20))
        seen = np.arange(300) < 150
        left = observed - predict(fit_quantile(features[seen], observed[seen], 0.9), features)
        invented.append((left[~seen] > 1e-9).mean() - (left[seen] > 1e-9).mean())
    assert np.mean(invented) > 0.04


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_the_raw_score_where_features_explain_difficulty(seed):
    observed, features, member = pool(seed)
    found = score(observed, features, ~member)
    assert auc(observed[member], observed[~member]) < 0.6
    assert auc(found[member], found[~member]) > 0.72  # best possible 0.76: unit normals one apart
    assert tpr_at_fpr(found[member], found[~member], 0.05)[0] > 0.15


def test_it_is_seeded_and_keeps_records_without_a_score_out():
    observed, features, member = pool(4, n=600)
    found = score(observed, features, ~member, seed=1)
    np.testing.assert_array_equal(found, score(observed, features, ~member, seed=1))
    assert not np.array_equal(found, score(observed, features, ~member, seed=2))
    observed[:3] = -np.inf
    features[:3] = np.nan
    found = score(observed, features, ~member)
    assert (found[:3] == -np.inf).all()
    assert np.isfinite(found[3:]).all()
    # Scores that never vary: no spread to divide by.
    assert np.isfinite(score(np.zeros(600), np.ones((600, 2)), ~member)).all()


def test_mistakes_are_named():
    observed, features, member = pool(0, n=300)
    with pytest.raises(UserError, match=r"too few non-members.*at least 375"):
        score(observed, features, ~member)
    with pytest.raises(UserError, match="one row of features"):
        score(observed, features[:5], ~member)
    with pytest.raises(UserError, match="high quantile"):
        score(observed, features, ~member, level=0.3)
    with pytest.raises(UserError, match="not a finite number"):
        score(observed, features * np.nan, ~member)

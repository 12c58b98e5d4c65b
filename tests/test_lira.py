"""LiRA against the exact likelihood ratio of known Gaussians, and where the loss attack must fail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from geoquant.errors import UserError
from geoquant.privacy.attacks.lira import halves, logit, offline, online
from geoquant.privacy.statistics import auc
from membership_toy import toy


def split_auc(scores, member) -> float:
    return auc(scores[member], scores[~member])


def exact(t):
    """The Neyman-Pearson statistic of the toy."""
    seen = norm.logpdf(t.target, t.difficulty + t.effect, t.noise)
    return seen - norm.logpdf(t.target, t.difficulty, t.noise)


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_the_loss_attack_where_difficulty_decides(seed):
    t = toy(seed)
    raw = split_auc(t.target, t.member)
    best = split_auc(exact(t), t.member)
    assert raw < 0.62
    assert best > 0.75
    assert split_auc(online(t.target, t.shadow, t.inside), t.member) > best - 0.07
    assert split_auc(offline(t.target, t.shadow, t.inside), t.member) > best - 0.07


def test_with_many_shadow_models_it_is_the_likelihood_ratio():
    t = toy(0, n=300, models=4000)
    found = online(t.target, t.shadow, t.inside)
    # Four moments from 2000 scores each: the ratio is off by about far / sqrt(2000) per record.
    far = 1 + ((t.target - t.difficulty) / t.noise) ** 2 + ((t.target - t.difficulty - t.effect) / t.noise) ** 2
    error = np.abs(found - exact(t)) / far
    assert np.sqrt(np.mean(error**2)) < 0.02
    assert error.max() < 0.1
    assert np.corrcoef(found, exact(t))[0, 1] > 0.999
    z = offline(t.target, t.shadow, t.inside)
    np.testing.assert_allclose(z, (t.target - t.difficulty) / t.noise, atol=0.4)


def test_pooling_is_exact_where_variances_are_equal_and_better_where_shadows_are_few():
    t = toy(1, n=4000, models=6, varied=False)
    one = (t.target, t.shadow, t.inside)
    for attack in (online, offline):
        pooled, own = (split_auc(attack(*one, pooled=p), t.member) for p in (True, False))
        assert pooled > own + 0.015
    # Default: pooled below 64 models, not from there on.
    np.testing.assert_array_equal(online(*one), online(*one, pooled=True))
    many = toy(1, n=50, models=64)
    few = (many.target, many.shadow, many.inside)
    np.testing.assert_array_equal(online(*few), online(*few, pooled=False))
    # The pooled deviation itself: noise 0.4, whatever the difficulty.
    z = offline(*one)
    mean_out = np.nanmean(np.where(one[2], np.nan, one[1]), axis=0)
    assert np.median((one[0] - mean_out) / z) == pytest.approx(0.4, rel=0.03)


def test_offline_never_looks_at_models_that_saw_the_record():
    t = toy(2, n=200)
    spoiled = np.where(t.inside, 1e6, t.shadow)
    np.testing.assert_array_equal(offline(t.target, t.shadow, t.inside), offline(t.target, spoiled, t.inside))
    out_only = toy(2, n=200).shadow - t.effect * t.inside
    nobody = np.zeros_like(t.inside)
    np.testing.assert_array_equal(offline(t.target, out_only), offline(t.target, out_only, nobody))
    assert split_auc(offline(t.target, out_only), t.member) > 0.7


def test_without_members_it_finds_nothing():
    values = []
    for seed in range(40):
        t = toy(seed, n=400)
        fake = np.random.default_rng([1, seed]).random(400) < 0.5
        values.append([split_auc(f(t.target, t.shadow, t.inside), fake) for f in (online, offline)])
    # The mean of 40 AUCs under the null has a standard error of 0.029 / sqrt(40).
    np.testing.assert_allclose(np.mean(values, axis=0), 0.5, atol=4 * 0.029 / np.sqrt(40))


def test_one_shadow_model_is_the_reference_attack():
    t = toy(3, n=100, models=1)
    np.testing.assert_allclose(offline(t.target, t.shadow, np.zeros((1, 100), bool)), t.target - t.shadow[0])
    # One model on either side of every record: no spread can be fitted, nothing divides by zero.
    both = np.stack([np.zeros(100), np.ones(100)])
    inside = np.stack([np.zeros(100, bool), np.ones(100, bool)])
    # Unit variance, and half of it more: both scores tell the level, and the effect is 1 for all.
    np.testing.assert_allclose(online(t.target, both, inside), (t.target - 0.5) / 1.5)


def test_scores_that_do_not_vary_stay_finite():
    target = np.array([1.0, 0.0, -1.0])
    shadow = np.zeros((8, 3))
    inside = np.arange(8)[:, None] % 2 == np.zeros(3, int)
    for pooled in (True, False):
        for attack in (online, offline):
            assert np.isfinite(attack(target, shadow, inside, pooled=pooled)).all()
    # One record of many has identical scores: its own deviation is not believed to be zero.
    t = toy(0, n=20, models=80)
    t.shadow[:, 0] = 1.0
    assert np.isfinite(offline(t.target, t.shadow, t.inside)).all()


def test_a_record_without_a_score_keeps_none():
    t = toy(4, n=50)
    whole = online(t.target[1:], t.shadow[:, 1:], t.inside[:, 1:])
    t.target[0] = -np.inf
    t.shadow[:, 0] = -np.inf
    found = online(t.target, t.shadow, t.inside)
    assert found[0] == offline(t.target, t.shadow, t.inside)[0] == -np.inf
    np.testing.assert_allclose(found[1:], whole)


def test_halves_are_halves():
    inside = halves(7, 500, seed=0)
    assert inside.shape == (7, 500)
    assert (inside.sum(axis=0) == 3).all()
    assert abs(inside[0].mean() - 3 / 7) < 4 * np.sqrt(12 / 49 / 500)
    np.testing.assert_array_equal(inside, halves(7, 500, seed=0))
    # Records are drawn apart from each other.
    assert np.mean(inside[:, :-1] & inside[:, 1:]) == pytest.approx(3 / 7 * 3 / 7, abs=0.03)


def test_logit_is_the_log_odds_of_the_mean_token_probability():
    p = np.array([1e-9, 0.1, 0.5, 0.99])
    np.testing.assert_allclose(logit(np.log(p)), np.log(p / (1 - p)), rtol=1e-9)
    assert np.isfinite(logit(np.array([0.0, -1e-12]))).all()
    assert logit(np.array([-np.inf]))[0] == -np.inf


def test_mistakes_are_named():
    t = toy(0, n=20, models=4)
    with pytest.raises(UserError, match="every shadow model's score"):
        online(t.target, t.shadow[:, :5], t.inside)
    with pytest.raises(UserError, match=r"did not see a record.*halves"):
        offline(t.target, t.shadow, np.ones_like(t.inside))
    with pytest.raises(UserError, match="models saw a record"):
        online(t.target, t.shadow, np.zeros_like(t.inside))
    with pytest.raises(UserError, match="pool the variance"):
        offline(t.target, t.shadow[:1], np.zeros((1, 20), bool), pooled=False)
    t.shadow[1, 3] = np.nan
    with pytest.raises(UserError, match="no finite score"):
        offline(t.target, t.shadow, t.inside)

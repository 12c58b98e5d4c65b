"""Rank correlations of scores with effects, against scipy, the permutation law and planted predictors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from geoquant.outliers.leaderboard import ceiling, leaderboard


@given(st.lists(st.integers(0, 6), min_size=6, max_size=20), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_correlation_is_scipys_with_ties(values, seed):
    effect = np.random.default_rng(seed).integers(0, 5, len(values)).astype(float)
    score = np.array(values, dtype=float)
    found = leaderboard({"one": score}, effect, resamples=10)[0]
    if len(set(values)) < 2 or len(set(effect)) < 2:
        assert np.isnan(found.rho)
        assert found.p == 1.0
    else:
        assert found.rho == pytest.approx(spearmanr(score, effect).statistic, abs=1e-12)


def test_p_agrees_with_scipys_permutation_law():
    generator = np.random.default_rng(0)
    score, effect = generator.normal(size=(2, 30))
    effect = effect + 0.4 * score
    found = leaderboard({"one": score}, effect, resamples=20000)[0]
    expected = spearmanr(score, effect).pvalue  # by Student's t
    assert found.p == pytest.approx(expected, rel=0.15)


def test_null_scores_are_called_predictors_at_the_stated_rate():
    """Family-wise, 8 null scores at 5%: of 100 boards at most 11 may alarm (binomial, p < 0.01 for more)."""
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(100):
        effect = generator.normal(size=25)
        scores = {str(index): generator.normal(size=25) for index in range(8)}
        alarms += any(one.p_holm < 0.05 for one in leaderboard(scores, effect, resamples=400))
    assert alarms <= 11


def test_scores_that_order_all_sites_alike_count_once():
    """Five orders: 5 p, 4 p... and not 7 p; a site less, or one swap of neighbours, makes an order of its own."""
    generator = np.random.default_rng(3)
    effect, plain = generator.normal(size=25), generator.normal(size=25) + np.arange(25) / 8
    swapped = plain.copy()
    swapped[[3, 17]] = plain[[17, 3]]
    near = plain.copy()
    lowest = plain.argsort()[:2]
    near[lowest] = plain[lowest[::-1]]
    fewer = np.where(np.arange(25) == 4, np.nan, plain)
    alone = {"plain": plain, "swapped": swapped, "near": near, "fewer": fewer, "other": generator.normal(size=25)}
    several = alone | {"scaled": 7 * plain, "bent": np.exp(plain)}
    board, wider = ({one.name: one for one in leaderboard(scores, effect)} for scores in (alone, several))
    for name in alone:
        assert wider[name].p_holm == board[name].p_holm
    assert wider["scaled"].p_holm == wider["bent"].p_holm == board["plain"].p_holm
    least = min(board.values(), key=lambda one: one.p)
    assert least.p_holm == pytest.approx(min(1.0, 5 * least.p))


def placed(generator, depth: float, kind: float) -> np.ndarray:
    """30 blocks of 7 kinds: so much of the variance is a random walk over blocks, so much is the kind's."""
    walk, kinds = generator.normal(size=30).cumsum(), generator.normal(size=7)
    shared = [(one - one.mean()) / one.std() for one in (walk, kinds)]
    own = generator.normal(size=(30, 7)) * np.sqrt(1 - depth - kind)
    return (own + np.sqrt(depth) * shared[0][:, None] + np.sqrt(kind) * shared[1]).ravel()


PLACES = {"blocks": np.repeat(np.arange(30), 7), "kinds": np.tile(np.arange(7), 30)}


@pytest.mark.parametrize(("depth", "kind"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.4), (0.4, 0.4)])
def test_what_score_and_effect_share_by_their_place_is_no_prediction(depth, kind):
    """At 5%: of 100 scores that know nothing at most 11 may alarm (binomial, p < 0.01 for more)."""
    generator = np.random.default_rng(6)
    alarms = 0
    for _ in range(100):
        score, effect = placed(generator, depth, kind), placed(generator, depth, kind)
        alarms += leaderboard({"one": score}, effect, **PLACES, resamples=300)[0].p < 0.05
    assert alarms <= 11


def test_beyond_block_and_kind_is_the_correlation_of_residuals_by_regression():
    """A missing site makes the table uneven; against least squares on indicator columns."""
    generator = np.random.default_rng(7)
    score = placed(generator, 0.3, 0.3)
    effect, kept = placed(generator, 0.3, 0.3) + score, np.arange(210) != 17
    columns = [(PLACES[name][:, None] == np.unique(PLACES[name]))[kept] for name in PLACES]
    design = np.concatenate(columns, axis=1).astype(float)
    ranks = [rankdata(one[kept]) for one in (score, effect)]
    left = [one - design @ np.linalg.lstsq(design, one)[0] for one in ranks]
    found = leaderboard({"one": np.where(kept, score, np.nan)}, effect, **PLACES, resamples=200)[0]
    assert found.partial == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    assert found.p < 0.01


def test_depth_itself_has_nothing_beyond_the_block():
    effect = placed(np.random.default_rng(8), 0.5, 0.0)
    found = leaderboard({"depth": PLACES["blocks"].astype(float)}, effect, **PLACES, resamples=100)[0]
    assert np.isnan(found.partial)
    assert found.p == 1.0


def test_blocks_are_drawn_whole():
    """Seven equal sites a block say no more than one: the interval is that of 30 sites, wider than that of 210."""
    generator = np.random.default_rng(9)
    score = generator.normal(size=30)
    effect = score + generator.normal(size=30)
    many = [np.repeat(one, 7) for one in (score, effect)]
    whole, single, free = (
        leaderboard({"one": one}, other, **places, resamples=1000)[0].ci
        for one, other, places in ((*many, PLACES), (score, effect, {}), (*many, {}))
    )
    assert whole == pytest.approx(single, abs=0.06)
    assert whole[1] - whole[0] > 1.8 * (free[1] - free[0])


def test_the_interval_covers_a_planted_correlation():
    """Bivariate normals with Spearman 0.5 (Pearson 2 sin(pi rho / 6)), 60 sites, 200 draws: bootstrap intervals of this
    size cover in 90% or more.
    """
    generator = np.random.default_rng(2)
    pearson = 2 * np.sin(np.pi * 0.5 / 6)
    covered = 0
    for _ in range(200):
        score, noise = generator.normal(size=(2, 60))
        effect = pearson * score + np.sqrt(1 - pearson**2) * noise
        low, high = leaderboard({"one": score}, effect, resamples=300)[0].ci
        covered += low <= 0.5 <= high
    assert covered >= 176


def test_the_best_comes_first_and_hits_are_counted():
    effect = np.arange(20.0)
    board = leaderboard({"noise": np.tile([1.0, 0.0], 10), "same": effect**3, "reverse": -effect}, effect, worst=5)
    assert [one.name for one in board][2] == "noise"
    hits = {one.name: one.hits for one in board}
    assert hits["same"] == 5
    assert hits["reverse"] == 0
    assert {one.name: round(one.rho, 9) for one in board}["reverse"] == -1


def test_a_score_that_is_the_same_everywhere_comes_last_and_disturbs_no_order():
    generator = np.random.default_rng(5)
    effect = generator.normal(size=30)
    scores = {f"s{n}": effect + n * generator.normal(size=30) for n in range(4)}
    mixed = {"s2": scores["s2"], "flat": np.ones(30), "s0": scores["s0"], "other": np.zeros(30), "s1": scores["s1"]}
    board = leaderboard(mixed, effect, resamples=50)
    assert [one.name for one in board] == ["s0", "s1", "s2", "flat", "other"]
    assert board[-1].p_holm == 1.0


def test_sites_without_a_number_are_left_out():
    effect = np.arange(12.0)
    score = np.where(effect < 3, np.nan, effect)
    found = leaderboard({"one": score}, effect, resamples=50)[0]
    assert found.sites == 9
    assert found.rho == pytest.approx(1)


def test_too_few_sites_are_refused():
    with pytest.raises(ValueError, match="at least 5 sites"):
        leaderboard({"one": np.ones(4)}, np.ones(4))


def test_the_ceiling_is_the_correlation_of_two_whole_measurements():
    """Effects of unit variance measured on 8 windows with noise 3: two whole measurements correlate by
    1 / (1 + 9 / 8) = 0.47 in Pearson's sense, 0.45 in Spearman's, within three standard errors over 400 sites.
    """
    generator = np.random.default_rng(3)
    truth = generator.normal(size=400)
    parts = truth + 3 * generator.normal(size=(8, 400))
    assert ceiling(parts) == pytest.approx(0.45, abs=0.13)
    assert ceiling(np.tile(truth, (4, 1))) == pytest.approx(1)

"""Attacks that look at both sides at once: no side is treated differently, and known Gaussians are known exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS, JOINT, lira, membership_scores, quantile, rmia
from geoquant.privacy.attacks.combined import WIDENING, combine, permutation_p_value, score, widened
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.evidence import Evidence, ShadowScores
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.statistics import auc, chance_p
from membership_toy import toy


def tokens(log_prob, lengths=None, seed=0) -> RecordScores:
    """Records with these mean log-probabilities."""
    n = len(log_prob)
    lengths = np.full(n, 1) if lengths is None else lengths
    total = int(lengths.sum())
    each = np.repeat(log_prob, lengths)
    mean, std = np.random.default_rng(seed).random((2, total))
    places, splits = np.arange(total), np.concatenate([[0], lengths.cumsum()])
    no = np.zeros(total, bool)
    return RecordScores(each, mean - 3, std + 0.5, no, each * np.nan, places, places + 1, splits)


def two_sides(seed=0, n=400, models=8, *, trained=True, **changes):
    """The evidence about members and non-members, made of the toy; log-probabilities far below 0."""
    t = toy(seed, n=n, models=models, offset=-30.0, **changes)
    target = t.target if trained else t.target - t.effect * t.member
    rng = np.random.default_rng([seed, 5])
    lengths = rng.integers(3, 30, n)
    base = t.difficulty + 0.3 * rng.normal(size=n)
    sides = []
    for side in (t.member, ~t.member):
        shadows = ShadowScores(t.shadow[:, side], t.inside[:, side], lengths[side])
        scores = (tokens(values[side], lengths[side], seed) for values in (target, base))
        sides.append(Evidence(*scores, zlib_bytes=20 + 4 * lengths[side], shadows=shadows))
    return sides, t


def swapped(pair):
    return pair[1], pair[0]


# ---- LiRA and RMIA


@pytest.mark.parametrize("models", [2, 4, 16])
def test_lira_and_rmia_reach_the_auc_that_gaussians_allow(models):
    """Equal noise and effect: the level of a record is known from all models, with the noise's variance / models.

    AUC = Phi(effect / (noise sqrt(2 (1 + 1 / models)))); offline knows it from the half that did not see the record.
    """
    found = {name: [] for name in ("lira", "rmia", "offline")}
    for seed in range(8):
        sides, t = two_sides(seed, n=2000, models=models, varied=False)
        for name in ("lira", "rmia"):
            found[name].append(auc(*JOINT[name].score(*sides)))
        z = lira.offline(t.target, t.shadow, t.inside)
        found["offline"].append(auc(z[t.member], z[~t.member]))
    error = 0.01 / np.sqrt(8)  # of an AUC near 0.83 from 1000 + 1000 records: 0.009
    best = norm.cdf(0.6 / 0.4 / np.sqrt(2 * (1 + 1 / models)))
    assert np.mean(found["lira"]) == pytest.approx(best, abs=4 * error)
    # p(x) is the mean of probabilities, which takes the highest of few more seriously than the mean of their logs does.
    assert best - 0.02 < np.mean(found["rmia"]) < best + 4 * error
    half = norm.cdf(0.6 / 0.4 / np.sqrt(2 * (1 + 2 / models)))
    assert np.mean(found["offline"]) == pytest.approx(half, abs=4 * error)


@pytest.mark.parametrize("models", [2, 4, 8])
def test_shrinking_the_effect_is_what_makes_few_models_worth_it(models):
    """Also where noise and effect differ from record to record."""
    gain = []
    for seed in range(6):
        t = toy(seed, n=1000, models=models)
        one = (t.target, t.shadow, t.inside)
        scores = lira.online(*one), lira.online(*one, spread=np.inf), lira.offline(*one)
        gain.append([auc(s[t.member], s[~t.member]) for s in scores])
    shrunk, alone, offline = np.mean(gain, axis=0)
    assert shrunk > max(alone, offline) + 0.01


def test_an_infinite_spread_is_the_papers_ratio_of_predictive_gaussians():
    t = toy(3, n=60, models=6)
    found = lira.online(t.target, t.shadow, t.inside, spread=np.inf)
    left = [[], []]
    for i in range(60):
        for side, mask in zip(left, (t.inside[:, i], ~t.inside[:, i])):
            side.extend(t.shadow[mask, i] - t.shadow[mask, i].mean())
    # Three scores a side: 2 of 3 degrees of freedom are left.
    std = [np.sqrt(np.sum(np.square(side)) / (60 * 2)) * np.sqrt(1 + 1 / 3) for side in left]
    for i in range(60):
        inside = t.inside[:, i]
        seen = norm.logpdf(t.target[i], t.shadow[inside, i].mean(), std[0])
        assert found[i] == pytest.approx(seen - norm.logpdf(t.target[i], t.shadow[~inside, i].mean(), std[1]))


def test_the_spread_of_the_effect_is_found():
    """Effects 0.3 to 0.9, uniform: standard deviation 0.6 / sqrt(12), whatever the noise of the means."""
    t = toy(0, n=20000, models=8)
    inside = np.where(t.inside, t.shadow, 0).sum(0) / 4 - np.where(t.inside, 0, t.shadow).sum(0) / 4
    assert lira._spread(inside, 2 * t.noise**2 / 4) == pytest.approx(0.6 / np.sqrt(12), rel=0.05)
    assert lira._spread(np.array([1.0, 1.1]), np.array([5.0, 5.0])) == 0.0


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_record_gets_the_same_score_on_either_side(seed):
    sides, _ = two_sides(seed, n=60, models=4)
    here, there = lira.joint(*sides), swapped(lira.joint(*swapped(sides)))
    np.testing.assert_allclose(np.concatenate(here), np.concatenate(there), rtol=1e-9)
    # RMIA measures against the non-members: what stays is how well members and non-members are told apart.
    assert auc(*rmia.joint(*sides)) == pytest.approx(auc(*swapped(rmia.joint(*swapped(sides)))), abs=1e-12)


def loss(side: Evidence) -> np.ndarray:
    return ATTACKS["loss"].score(side)


def shadow_rows(sides) -> np.ndarray:
    return np.concatenate([side.shadows.mean_log_prob for side in sides], axis=1)


def test_rmia_is_the_double_loop_in_which_a_record_ties_with_itself():
    sides, _ = two_sides(1, n=50, models=5)

    def ratio(side, i):
        return loss(side)[i] - np.log(np.mean([np.exp(row[i]) for row in side.shadows.mean_log_prob]))

    others = [ratio(sides[1], j) for j in range(25)]
    inside, outside = rmia.joint(*sides)
    for i in range(25):
        assert inside[i] == pytest.approx(np.mean([ratio(sides[0], i) >= z for z in others]))
        wins = [0.5 if j == i else float(others[i] >= z) for j, z in enumerate(others)]
        assert outside[i] == pytest.approx(np.mean(wins))


def test_a_population_of_nonmembers_leans_to_neither_side():
    """Their mean share is one half, and the AUC is that of the ratios to the last pair."""
    sides, _ = two_sides(2, n=24, models=4)
    inside, outside = rmia.joint(*sides)
    np.testing.assert_allclose(np.sort(outside), (np.arange(12) + 0.5) / 12)
    ratio = rmia.log_ratio(np.concatenate([loss(side) for side in sides]), shadow_rows(sides))
    assert auc(inside, outside) == auc(ratio[:12], ratio[12:])


# ---- quantile regression


def test_quantile_regresses_on_length_bytes_and_reference():
    sides, _ = two_sides(0, n=300)
    found = np.concatenate(quantile.joint(*sides))
    parts = [(loss(s), np.log(s.target.lengths), np.log(s.zlib_bytes), loss(Evidence(s.reference))) for s in sides]
    observed, *features = (np.concatenate(part) for part in zip(*parts))
    nonmember = np.arange(300) >= 150
    wanted = quantile.score(observed, np.column_stack(features), nonmember, level=1 - 25 / 150)
    np.testing.assert_allclose(found, wanted)
    assert auc(found[:150], found[150:]) > auc(observed[:150], observed[150:]) + 0.05


def test_the_level_is_what_the_nonmembers_can_carry():
    assert quantile.highest_level(100, 3) == pytest.approx(0.75)
    assert quantile.highest_level(200, 3) == pytest.approx(0.875)
    assert quantile.highest_level(5000, 3) == 0.95
    with pytest.raises(UserError, match="got 99; wanted at least 100"):
        quantile.highest_level(99, 3)
    for count in (100, 107, 151, 333, 499, 500, 640):  # what `highest_level` allows, `score` accepts
        rng = np.random.default_rng(count)
        level = quantile.highest_level(count, 3)
        found = quantile.score(rng.normal(size=count), rng.normal(size=(count, 3)), np.ones(count, bool), level=level)
        assert np.mean(found > 0) == pytest.approx(1 - level, abs=0.1)


# ---- running them


def test_what_the_evidence_lacks_is_not_run():
    sides, _ = two_sides(0, n=300)
    assert list(membership_scores(*sides)) == [name for name in (*ATTACKS, *JOINT) if name != "lowercase"]
    bare = [replace(side, shadows=None) for side in sides]
    assert not {"lira", "rmia"} & set(membership_scores(*bare))
    few = two_sides(0, n=198)[0]
    assert "quantile" not in membership_scores(*few)
    assert "quantile" not in membership_scores(*(replace(side, reference=None) for side in sides))
    one_sided = [sides[0], bare[1]]
    assert not {"lira", "rmia"} & set(membership_scores(*one_sided))
    for name, attack in JOINT.items():
        assert attack.possible(*sides)
        with pytest.raises(UserError, match="attack needs"):
            attack.score(*(Evidence(side.target) for side in sides))
        assert not attack.possible(*(Evidence(side.target) for side in sides)), name


def test_records_without_tokens_keep_no_score():
    sides, _ = two_sides(4, n=300)
    whole = membership_scores(*sides)
    lengths = sides[0].target.lengths.copy()
    first = int(lengths[0])
    lengths[0] = 0
    empty = []
    for scores in (sides[0].target, sides[0].reference):
        means = scores.record_sums(scores.log_prob) / scores.lengths
        empty.append(tokens(means, lengths, 4))
    rows = sides[0].shadows.mean_log_prob.copy()
    rows[:, 0] = -np.inf
    shadows = replace(sides[0].shadows, mean_log_prob=rows, lengths=lengths)
    found = membership_scores(replace(sides[0], target=empty[0], reference=empty[1], shadows=shadows), sides[1])
    assert first > 0
    for name in JOINT:
        assert found[name][0][0] == -np.inf
        assert np.isfinite(found[name][0][1:]).all()
        assert np.isfinite(found[name][1]).all()
        # What one record is left out of changes little for the others.
        assert np.corrcoef(found[name][1], whole[name][1])[0, 1] > 0.98
    both = combine(found, permutations=9)
    assert both.scores[0][0] == -np.inf


def test_shadows_of_another_tokenizer_are_refused():
    sides, _ = two_sides(0, n=40)
    lengths = sides[0].shadows.lengths.copy()
    lengths[3] += 1
    other = [replace(sides[0], shadows=replace(sides[0].shadows, lengths=lengths)), sides[1]]
    for name in ("lira", "rmia"):
        with pytest.raises(UserError, match="cut the records into other tokens"):
            JOINT[name].score(*other)


# ---- the combination


def test_combine_is_the_cross_fitted_score_with_its_exact_test():
    sides, _ = two_sides(0, n=120, models=4)
    found = membership_scores(*sides)
    both = combine(found, permutations=19, seed=3)
    columns = np.column_stack([np.concatenate(pair) for pair in found.values()])
    member = np.arange(120) < 60
    np.testing.assert_array_equal(np.concatenate(both.scores), score(columns, member, seed=3))
    assert both.p == permutation_p_value(columns, member, permutations=19, seed=3) == 0.05
    assert both.attacks == tuple(found)


def test_there_may_be_nothing_to_combine():
    rng = np.random.default_rng(0)
    column = lambda n, m: (rng.normal(size=n), rng.normal(size=m))  # noqa: E731
    assert combine({}) is None
    assert combine({"loss": column(50, 50)}) is None
    assert combine({"loss": column(9, 50), "zlib": column(9, 50)}) is None
    missing = column(10, 50)
    missing[0][0] = -np.inf
    assert combine({"loss": column(10, 50), "zlib": missing}) is None
    assert combine({"loss": column(10, 10), "zlib": column(10, 10)}, permutations=9).scores[0].shape == (10,)


def test_a_widened_interval_is_as_much_wider_as_it_says():
    low, high = widened((0.4, 0.7), 0.6)
    assert (0.6 - low, high - 0.6) == pytest.approx((WIDENING * 0.2, WIDENING * 0.1))
    assert widened((0.9, 1.0), 1.0) == pytest.approx((0.85, 1.0))
    assert widened((0.7, 0.999), 0.8)[1] == 1.0


def test_where_nothing_was_learned_attacks_err_no_more_than_they_say():
    """30 targets that saw neither side. A rate of 5% gives more than 6 of 30 once in 1000 times."""
    alarms: dict[str, int] = {}
    missed = 0
    for seed in range(30):
        sides, _ = two_sides(seed, n=200, models=4, trained=False)
        found = membership_scores(*sides)
        for name in JOINT:
            alarms[name] = alarms.get(name, 0) + (chance_p(*found[name]) <= 0.05)
        both = combine(found, permutations=19, seed=seed)
        alarms["combined"] = alarms.get("combined", 0) + (both.p <= 0.05)
        low, high = widened(delong_interval(*both.scores), auc(*both.scores))
        missed += not low <= 0.5 <= high
    assert set(alarms) == {"lira", "rmia", "quantile", "combined"}
    assert max(*alarms.values(), missed) <= 6

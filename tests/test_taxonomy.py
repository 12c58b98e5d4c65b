"""Labels by their rules, weights by their properties, agreement against sklearn, verdicts beside permuted labels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.outliers.effects import Effect
from geoquant.outliers.paired import advantage_shift, flip_shift, gap_shift, shift
from geoquant.outliers.taxonomy import agreement, kappa, labels, overlap_weight, percentile_ranks, scores, threshold
from geoquant.outliers.verdict import verdict
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.statistics import auc

UNIT = st.floats(0, 1)


@given(st.floats(1, 1e6), st.floats(1e-3, 10))
def test_the_threshold_is_the_rise_of_perplexity(perplexity, rise):
    after = math.exp(math.log(perplexity) + threshold(perplexity, rise))
    assert after - perplexity == pytest.approx(rise, rel=1e-6, abs=1e-8 * perplexity)


def test_the_default_threshold_is_a_rise_of_0_3():
    assert 25.6 * math.exp(threshold(25.6)) - 25.6 == pytest.approx(0.3, rel=1e-12)
    with pytest.raises(ValueError, match="above 0"):
        threshold(0.0)


@given(UNIT, UNIT, UNIT, UNIT)
def test_the_overlap_weight_is_a_share_and_moves_the_right_way(functional, private, preference, other):
    weight = overlap_weight(functional, private, preference)
    assert 0 <= weight <= 1
    low, high = sorted([private, other])
    assert overlap_weight(functional, high, preference) >= overlap_weight(functional, low, preference) - 1e-12
    low, high = sorted([functional, other])
    assert overlap_weight(high, private, preference) <= overlap_weight(low, private, preference) + 1e-12
    low, high = sorted([preference, other])
    assert overlap_weight(functional, private, high) >= overlap_weight(functional, private, low) - 1e-12


@given(UNIT, UNIT)
def test_limits_of_the_overlap_weight(preference, score):
    assert overlap_weight(0.0, 0.0, preference) == preference
    assert overlap_weight(score, score, preference) == pytest.approx(preference)
    assert overlap_weight(score, score, 1.0) == 1
    assert overlap_weight(score, score, 0.0) == 0


def test_the_overlap_weight_by_hand_and_out_of_range():
    np.testing.assert_allclose(overlap_weight([0.8, 0.0, 0.5], [0.2, 0.7, 0.0], 0.25), [0.05 / 0.65, 1, 0])
    with pytest.raises(ValueError, match=r"S_priv must lie in \[0, 1\]"):
        overlap_weight([0.5], [1.5], 0.5)


def test_percentile_ranks():
    assert percentile_ranks([3.0, -1.0, 10.0, math.inf, 3.0]).tolist() == [0.375, 0, 0.75, 1, 0.375]
    assert percentile_ranks([7.0]).tolist() == [0.5]
    assert percentile_ranks([0.0, 0.0, 0.0]).tolist() == [0.5] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=2, max_size=40))
def test_kappa_is_that_of_sklearn(pairs):
    from sklearn.metrics import cohen_kappa_score

    first, second = zip(*pairs)
    found = kappa(first, second, resamples=50)
    if len({*first, *second}) == 1:
        assert found.value is None
        assert found.same == 1
        return
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.same == np.mean([a == b for a, b in pairs])


def test_the_interval_of_kappa_holds_the_truth_as_often_as_it_says():
    """100 samples of 150 things from a known table, kappa 0.6: a 90% interval that failed 22 times or more would do so
    with probability below 3e-4. Observed: 9.
    """
    rng = np.random.default_rng(0)
    chances = np.array([[0.4, 0.1], [0.1, 0.4]])
    missed = 0
    for seed in range(100):
        cells = rng.choice(4, size=150, p=chances.flatten())
        low, high = kappa(["aabb"[c] for c in cells], ["abab"[c] for c in cells], level=0.9, seed=seed).ci
        missed += not low <= 0.6 <= high
    assert missed < 22


def test_agreement_of_several_labelings():
    found = agreement({"seed 0": list("aabb"), "seed 1": list("aabb"), "seed 2": list("abab")})
    assert list(found) == [("seed 0", "seed 1"), ("seed 0", "seed 2"), ("seed 1", "seed 2")]
    assert found["seed 0", "seed 1"].value == 1
    assert found["seed 0", "seed 2"].value == 0
    with pytest.raises(ValueError, match="4 and 3 labels"):
        kappa(list("aaab"), list("aab"))


def sides(distance, seed=0, n=80, m=90, noise=0.0):
    """Scores of members and non-members; the same seed means the same records."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(n) + distance, rng.standard_normal(m)
    other = np.random.default_rng(seed + 1000)
    return tuple(side + noise * other.standard_normal(len(side)) for side in found)


def test_an_attack_that_falls_toward_chance_fell():
    before, after = sides(2.0), sides(0.5)
    found = advantage_shift(before, after)
    assert found.before == pytest.approx(2 * auc(*before) - 1)
    assert found.value == pytest.approx(2 * (auc(*after) - auc(*before)))
    assert found.ci == pytest.approx([2 * end for end in paired_difference(before, after).ci])
    assert found.ci[1] < 0
    assert found.p < 1e-6
    assert found.tpr["0.1"][0] > found.tpr["0.1"][1]
    assert "0.01" not in found.tpr  # 90 non-members cannot say
    assert advantage_shift(after, before).p == 1


def test_an_attack_turned_around_is_as_good_as_it_was():
    before = sides(1.5)
    turned = tuple(-side for side in before)
    found = advantage_shift(before, turned)
    assert found.auc[1] == pytest.approx(1 - found.auc[0])
    assert found.value == pytest.approx(0)
    assert found.p > 0.9
    # From below 1/2 to nearer 1/2 is a fall as well.
    assert advantage_shift(turned, sides(0.3)).p < 1e-4
    assert advantage_shift(turned, sides(0.3)).value < 0


def test_a_change_that_means_nothing_is_called_a_fall_at_the_stated_rate():
    """60 pairs of attacks of equal strength: 5% two-sided means 2.5% of falls; 7 or more have probability 1e-3.
    Observed: 3.
    """
    found = [advantage_shift(sides(1.0, s, noise=0.7), sides(1.0, s + 7, noise=0.7)) for s in range(60)]
    assert sum(one.p < 0.05 for one in found) < 7


def test_shifts_by_formula():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(3)
    before, after = rng.standard_normal(12), rng.standard_normal(12) + 0.5
    found = shift(before, after)
    test = ttest_rel(after, before)
    assert found.p == pytest.approx(test.pvalue)
    assert found.ci == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.se == pytest.approx((after - before).std(ddof=1) / 12**0.5)
    same = shift(before, before)
    assert (same.value, same.p) == (0, 1)
    assert shift(np.zeros(5), np.full(5, -1.0)).p == 2 / 32
    alone = shift(np.array([1.0]), np.array([3.0]))
    assert (alone.value, alone.se, alone.p) == (2, None, 1)
    with pytest.raises(ValueError, match="pairs of 1 and 2"):
        shift(np.zeros(1), np.zeros(2))


def test_flips_are_a_coin():
    found = flip_shift([True] * 10 + [False] * 5, [False] * 8 + [True] * 3 + [False] * 4)
    assert (found.won, found.lost, found.count) == (1, 8, 15)
    assert found.value == pytest.approx(-7 / 15)
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert flip_shift([True], [True]).p == 1


def test_the_gap_of_losses():
    before, after = (np.array([3.0, 5.0]), np.array([1.0])), (np.array([2.0, 2.0]), np.array([3.0]))
    found = gap_shift(before, after)
    assert (found.before, found.after, found.value) == (3, 1, -2)
    assert found.se == pytest.approx(1.0)  # the members' changes -1 and -3


def effect(nll=0.0, se=0.001, before=3.0, **rest):
    one = shift(np.zeros(2), np.zeros(2))
    return Effect("a", "zero", replace(one, before=before, value=nll, se=se), **rest)


FELL, STAYED = advantage_shift(sides(2.0), sides(0.2)), advantage_shift(sides(2.0), sides(2.0))
TAU = threshold(math.exp(3.0))


@pytest.mark.parametrize(
    ("nll", "attack", "label"),
    [
        (TAU + 1e-4, STAYED, "functional"),
        (TAU - 1e-4, FELL, "sensitive"),
        (math.inf, FELL, "both"),
        (-1.0, STAYED, "neither"),
    ],
)
def test_the_four_labels(nll, attack, label):
    (found,) = labels([effect(nll, attacks={"loss": attack})])
    assert found.name == label
    assert found.tau == TAU
    assert f"a is {label}: zero changes public NLL by" in found.sentence
    assert ("the advantage of the loss attack falls" in found.sentence) == (attack is FELL)


def test_noise_and_tasks_have_a_say_in_what_is_functional():
    assert labels([effect(0.05, se=0.03)])[0].name == "neither"
    lost, won = flip_shift([True] * 4, [False] * 3 + [True]), flip_shift([False] * 4, [True] * 3 + [False])
    assert labels([effect(0.05, tasks={"arc": lost})])[0].name == "functional"
    assert labels([effect(0.05, tasks={"arc": won})])[0].name == "neither"
    assert labels([effect(0.05)])[0].sentence.endswith("no privacy measure was taken")


def test_a_rise_of_a_measure_is_no_fall():
    up, down = shift(np.zeros(9), np.arange(9) + 5.0), shift(np.zeros(9), -np.arange(9) - 5.0)
    assert not labels([effect(exposure=up)])[0].sensitive
    found = labels([effect(exposure=down, attacks={"loss": STAYED})])[0]
    assert found.sensitive
    assert found.by == "exposure"
    assert "and exposure falls with p" in found.sentence


def test_attacks_can_be_asked_one_by_one():
    found = [effect(attacks={"loss": FELL, "reference": STAYED})]
    assert labels(found, measures=["loss"])[0].sensitive
    assert not labels(found, measures=["reference"])[0].sensitive
    assert labels(found, measures=["loss"])[0].p == pytest.approx(FELL.p)
    assert labels(found)[0].p == pytest.approx(2 * FELL.p)


def test_many_groups_are_corrected_together():
    mild = next(
        one
        for d in np.linspace(1.9, 1.0, 60)
        if 0.005 < (one := advantage_shift(sides(2.0), sides(d, noise=0.4))).p < 0.04
    )
    assert labels([effect(attacks={"loss": mild})])[0].sensitive
    many = labels([effect(attacks={"loss": mild})] + [effect(attacks={"loss": STAYED})] * 20)
    assert not any(one.sensitive for one in many)
    assert many[0].p == pytest.approx(21 * mild.p)


def test_scores_rank_what_all_effects_have():
    found = [
        effect(0.3, attacks={"loss": FELL, "reference": STAYED}),
        effect(0.1, attacks={"loss": STAYED}),
        effect(0.2, attacks={"loss": advantage_shift(sides(2.0), sides(1.0))}),
    ]
    functional, private = scores(found)
    assert functional.tolist() == [1, 0, 0.5]
    assert private.tolist() == [1, 0, 0.5]
    assert scores([effect(0.1)])[1] is None


def groups(label, distance, n=45, seed=0):
    """Three features, the first of which knows which third of the groups has the label."""
    rng = np.random.default_rng(seed)
    having = rng.permutation(n) < n // 3
    features = rng.standard_normal((n, 3))
    features[having, 0] += distance
    return features, [label if one else "neither" for one in having]


def test_the_verdict_finds_what_is_there():
    found = verdict(*groups("functional", 4.0), ("a", "b", "c"), permutations=39)
    functional, sensitive = found.questions
    assert functional.found.auc[functional.best] > 0.95
    assert functional.p == pytest.approx(2 / 40)
    assert "15 of 45 groups are functional, and geometry tells them apart: held-out AUC" in found.sentence
    assert sensitive.found is None
    assert "; not enough to tell: 0 of 45 groups are sensitive" in found.sentence


def test_the_verdict_says_what_is_not_there():
    found = verdict(*groups("sensitive", 0.0), ("a", "b", "c"), permutations=39)
    assert found.questions[1].p > 0.05
    assert "15 of 45 groups are sensitive, and geometry does not tell them apart: held-out AUC" in found.sentence


def test_a_verdict_without_enough_says_so():
    features, _ = groups("both", 0.0, 20)
    features[0, 1] = np.nan
    kinds = ["neither"] * 17 + ["functional"] * 3
    found = verdict(features, kinds, ("a", "b", "c"))
    assert found.sentence == (
        "not enough to tell: 3 of 19 groups are functional, and 5 of either kind are needed; "
        "not enough to tell: 0 of 19 groups are sensitive, and 5 of either kind are needed "
        "(1 groups without all features left out)"
    )
    same = verdict(np.ones((20, 1)), ["both", "neither"] * 10, ("a",))
    assert "10 of 20 groups are sensitive, but no feature varies" in same.sentence
    assert verdict(np.zeros((0, 2)), [], ("a", "b")).questions[0].rows == (0, 0)


def test_verdicts_refuse_what_cannot_be_judged():
    with pytest.raises(ValueError, match=r"features of shape \(3, 1\) for 2 labels"):
        verdict(np.ones((3, 1)), ["both"] * 2, ("a",))
    with pytest.raises(ValueError, match=r"unknown labels \['island'\]"):
        verdict(np.ones((1, 1)), ["island"], ("a",))
    with pytest.raises(ValueError, match="78 permutations, wanted at least 79"):
        verdict(np.random.rand(20, 1), ["both", "neither"] * 10, ("a",), permutations=78)

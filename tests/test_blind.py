"""The gate: exact on clean splits, fires on planted differences, and its shortcuts equal the slow way."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.linear_model import Ridge

from geoquant.data.private import demo_split, make_records
from geoquant.data.records import Record
from geoquant.privacy import blind
from geoquant.privacy.blind import LEVEL, best_word, blind_test, out_of_fold
from geoquant.privacy.statistics import auc


def dealt(n: int, m: int, seed: int):
    """A clean split: one pool, sides at random."""
    pool = make_records(n + m, seed)
    random.Random(seed).shuffle(pool)
    return pool[:n], pool[n:]


def test_a_hundred_clean_splits_are_refused_as_rarely_as_stated(monkeypatch):
    """At 1% the chance of more than four alarms in a hundred is 0.3%; p-values are uniform as well."""
    monkeypatch.setattr(blind, "DEALS", 199)  # the level is exact for any number of deals
    found = [blind_test(*dealt(40, 30, seed), seed=seed) for seed in range(100)]
    assert sum(not result.valid for result in found) <= 4
    assert kstest([result.p for result in found], "uniform").pvalue > 0.01
    for result in found:  # the alarm's threshold says the same as the p-value
        assert result.valid == (result.p > LEVEL)
        if result.auc < result.alarm - 1e-9:
            assert result.valid


def years(side, low, high, rng):
    """The same notes with a year after the day."""
    return [Record(re.sub(r"on (\w+ \d+)", lambda m: f"on {m[1]}, {rng.randrange(low, high)}", r.text)) for r in side]


@pytest.mark.parametrize("shift", ["dates", "template", "length", "case"])
def test_a_planted_difference_is_noticed(shift):
    rng = random.Random(2)
    members, nonmembers = dealt(120, 120, 11)
    if shift == "dates":  # ranges that overlap
        members, nonmembers = years(members, 2015, 2020, rng), years(nonmembers, 2018, 2023, rng)
    elif shift == "template":
        nonmembers = [
            Record(re.sub(r"^(.*?)[.]?$", r"Re: \1", r.text)) if rng.random() < 0.4 else r for r in nonmembers
        ]
    elif shift == "length":
        nonmembers = [Record(r.text[: len(r.text) - rng.randrange(30)]) for r in nonmembers]
    else:
        nonmembers = [Record(r.text.upper()) if rng.random() < 0.4 else r for r in nonmembers]
    found = blind_test(members, nonmembers)
    assert not found.valid
    assert found.auc > max(0.6, found.alarm - 1e-9)
    assert found.ci[0] > 0.5
    assert found.view == {"dates": "words", "template": "word", "length": "sizes", "case": "sizes"}[shift]


def test_the_demo_passes_and_the_test_is_seeded():
    split = demo_split()
    found = blind_test(split.members, split.nonmembers)
    assert found.valid
    assert (found.n_members, found.n_nonmembers) == (100, 100)
    assert found == blind_test(split.members, split.nonmembers)


def test_members_seen_several_times_are_no_difference():
    """Copies in two folds would betray each other's side."""
    members, nonmembers = dealt(40, 40, 7)
    plain = blind_test(members, nonmembers)
    assert blind_test([*members, *members[:20] * 5], nonmembers) == plain
    assert plain.valid


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_out_of_fold_is_ridge_fitted_anew_for_each_fold(n, d):
    rng = np.random.default_rng(0)
    view, targets, folds = rng.normal(size=(n, d)), rng.normal(size=(n, 3)), rng.permutation(np.arange(n) % 5)
    found = out_of_fold(view, targets, folds)
    for fold in range(5):
        held = folds == fold
        slow = Ridge(alpha=1.0, fit_intercept=False).fit(view[~held], targets[~held]).predict(view[held])
        np.testing.assert_allclose(found[held], slow, atol=1e-9)
    # What a record's own fold is labelled plays no part.
    np.testing.assert_allclose(out_of_fold(view, targets * (folds != 0)[:, None], folds)[folds == 0], found[folds == 0])


def test_the_best_word_is_found_in_the_other_folds():
    """By comparing every word's correlation, one fold and one column at a time."""
    rng = np.random.default_rng(4)
    present, targets = rng.integers(0, 2, (30, 8)).astype(float), rng.normal(size=(30, 4))
    targets -= targets.mean(axis=0)
    folds = rng.permutation(np.arange(30) % 5)
    found = best_word(present, targets, folds)
    for fold in range(5):
        held = folds == fold
        for column in range(4):
            pairs = [np.corrcoef(word[~held], targets[~held, column])[0, 1] for word in present.T]
            best = int(np.argmax(np.abs(pairs)))
            np.testing.assert_array_equal(found[held, column], np.sign(pairs[best]) * present[held, best])


def test_one_mark_is_enough_in_few_records():
    members, nonmembers = dealt(12, 12, 5)
    assert blind_test(members, nonmembers).valid
    found = blind_test([Record(f"2019: {record.text}") for record in members], nonmembers)
    assert (found.valid, found.view, found.auc) == (False, "word", 1.0)


def test_aucs_of_columns():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (30, 6)).astype(float)
    sides = np.column_stack([rng.permutation(np.repeat([1.0, 0.0], [12, 18])) for _ in range(6)])
    wanted = [auc(s[side == 1], s[side == 0]) for s, side in zip(scores.T, sides.T, strict=True)]
    np.testing.assert_allclose(blind._aucs(scores, sides), wanted)


def test_huge_sides_are_sampled(monkeypatch):
    monkeypatch.setattr(blind, "MOST", 25)
    found = blind_test(*dealt(40, 20, 3))
    assert (found.n_members, found.n_nonmembers) == (25, 20)


def test_texts_without_words():
    """Nothing to read but how long they are."""
    blank, long = [Record("\x07" * k) for k in range(1, 21)], [Record("\x07" * k) for k in range(41, 61)]
    assert blind_test(blank[::2], blank[1::2]).valid
    assert not blind_test(blank, long).valid


def test_one_record_on_a_side_says_nothing():
    assert blind_test([Record("one")] * 12, [Record("two")] * 12).valid

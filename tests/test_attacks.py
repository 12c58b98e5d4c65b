"""Attacks: one contract for all, and each against its formula written out record by record."""

from __future__ import annotations

import numpy as np
import pytest

from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.scores import RecordScores


def made(rng, lengths) -> RecordScores:
    splits = np.concatenate([[0], np.cumsum(lengths)])
    total = int(splits[-1])
    log_prob = -rng.exponential(2.0, total).astype(np.float32)
    zeros = np.zeros(total, np.float32)
    places = np.arange(total)
    return RecordScores(log_prob, zeros, zeros + 1, zeros > 0, zeros * np.nan, places, places + 1, splits)


LENGTHS = [1, 7, 0, 40, 4, 5, 13]


@pytest.fixture
def target():
    return made(np.random.default_rng(0), LENGTHS)


@pytest.fixture
def reference():
    return made(np.random.default_rng(1), LENGTHS)


def records(scores):
    return [scores.log_prob[a:b].astype(np.float64) for a, b in zip(scores.splits[:-1], scores.splits[1:], strict=True)]


def shifted(scores: RecordScores, record: int, by: float) -> RecordScores:
    """The same scores with one record's log-probabilities raised."""
    from dataclasses import replace

    log_prob = scores.log_prob.copy()
    log_prob[scores.splits[record] : scores.splits[record + 1]] += by
    return replace(scores, log_prob=log_prob)


@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name, target, reference):
    attack = ATTACKS[name]
    values = attack.score(target, reference)
    assert values.shape == (len(LENGTHS),)
    assert values[2] == -np.inf
    assert np.isfinite(np.delete(values, 2)).all()
    np.testing.assert_array_equal(values, attack.score(target, reference))
    raised = attack.score(shifted(target, 3, 0.5), reference)
    assert raised[3] > values[3]  # better predicted, more likely a member
    np.testing.assert_allclose(np.delete(raised, 3), np.delete(values, 3), rtol=1e-6)
    if attack.needs_reference:
        with pytest.raises(UserError, match="--reference"):
            attack.score(target, None)
    else:
        np.testing.assert_array_equal(values, attack.score(target, None))


def test_loss_is_the_mean_log_probability(target):
    wanted = [r.mean() if len(r) else -np.inf for r in records(target)]
    np.testing.assert_allclose(ATTACKS["loss"].score(target, None), wanted, rtol=1e-6)


def test_reference_is_the_mean_gain(target, reference):
    wanted = [(a - b).mean() if len(a) else -np.inf for a, b in zip(records(target), records(reference), strict=True)]
    np.testing.assert_allclose(ATTACKS["reference"].score(target, reference), wanted, rtol=1e-5)


def test_min_k_is_the_mean_of_the_lowest_fifth(target):
    wanted = []
    for record in records(target):
        lowest = sorted(record)[: max(1, len(record) // 5)]
        wanted.append(np.mean(lowest) if len(record) else -np.inf)
    np.testing.assert_allclose(ATTACKS["min-k"].score(target, None), wanted, rtol=1e-6)


def test_a_reference_with_another_tokenizer_is_refused(target):
    other = made(np.random.default_rng(1), [*LENGTHS[:-1], 12])
    with pytest.raises(UserError, match="other tokens than the audited model"):
        ATTACKS["reference"].score(target, other)

"""Attacks: one contract for all, and each against its formula written out record by record."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from geoquant.data.records import Record, Split
from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.evidence import Evidence, gather
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records, score_split


def made(rng, lengths) -> RecordScores:
    splits = np.concatenate([[0], np.cumsum(lengths)])
    total = int(splits[-1])
    log_prob = -rng.exponential(2.0, total).astype(np.float32)
    zeros = np.zeros(total, np.float32)
    places = np.arange(total) - np.repeat(splits[:-1], lengths)
    mean, std = -rng.exponential(2.0, total).astype(np.float32), rng.uniform(0.1, 2, total).astype(np.float32)
    return RecordScores(log_prob, mean, std, zeros > 0, zeros * np.nan, places, places + 1, splits)


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
    log_prob = scores.log_prob.copy()
    log_prob[scores.splits[record] : scores.splits[record + 1]] += by
    return replace(scores, log_prob=log_prob)


TEXTS = ["", "seventh", "?", "word " * 8, "four", "fives", "thirteen ones"]


@pytest.fixture
def evidence(target, reference):
    lowered = made(np.random.default_rng(2), [1, 9, 0, 38, 4, 5, 13])  # in lower case texts have other tokens
    return gather([Record(text) for text in TEXTS], target, reference, lowered)


@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name, target, evidence):
    attack = ATTACKS[name]
    values = attack.score(evidence)
    assert values.shape == (len(LENGTHS),)
    assert values[2] == -np.inf
    assert np.isfinite(np.delete(values, 2)).all()
    np.testing.assert_array_equal(values, attack.score(evidence))
    raised = attack.score(replace(evidence, target=shifted(target, 3, 0.5)))
    assert raised[3] > values[3]  # better predicted, more likely a member
    np.testing.assert_allclose(np.delete(raised, 3), np.delete(values, 3), rtol=1e-6)
    bare = Evidence(target)
    assert attack.possible(evidence)
    assert attack.possible(bare) == (not attack.needs)
    if attack.needs:
        with pytest.raises(UserError, match=f"the {name} attack needs"):
            attack.score(bare)
    else:
        np.testing.assert_array_equal(values, attack.score(bare))


def test_loss_is_the_mean_log_probability(target):
    wanted = [r.mean() if len(r) else -np.inf for r in records(target)]
    np.testing.assert_allclose(ATTACKS["loss"].score(Evidence(target)), wanted, rtol=1e-6)


def test_reference_is_the_mean_gain(evidence):
    pairs = zip(records(evidence.target), records(evidence.reference), strict=True)
    wanted = [(a - b).mean() if len(a) else -np.inf for a, b in pairs]
    np.testing.assert_allclose(ATTACKS["reference"].score(evidence), wanted, rtol=1e-5)


def test_min_k_is_the_mean_of_the_lowest_fifth(target):
    wanted = []
    for record in records(target):
        lowest = sorted(record)[: max(1, len(record) // 5)]
        wanted.append(np.mean(lowest) if len(record) else -np.inf)
    np.testing.assert_allclose(ATTACKS["min-k"].score(Evidence(target)), wanted, rtol=1e-6)


def test_zlib_is_the_mean_over_the_bytes_of_the_scored_text(evidence):
    """The last scored token of a record ends where its text does, but for the fourth: 40 tokens, one a character."""
    wanted = [
        record.mean() / len(zlib.compress(text[: len(record)].encode())) if len(record) else -np.inf
        for record, text in zip(records(evidence.target), TEXTS, strict=True)
    ]
    np.testing.assert_allclose(ATTACKS["zlib"].score(evidence), wanted, rtol=1e-6)
    assert evidence.zlib_bytes[3] < 40  # eight times the same word


def test_lowercase_is_the_ratio_of_two_perplexities_of_plain_forward_passes(tiny_model, tiny_tokenizer):
    texts = ["Ann Lee called from Paris at NOON.", "no capitals here", "a", "Q"]
    split = Split(tuple(Record(t) for t in texts), tuple(Record(t) for t in texts))
    scores = score_split(tiny_model, tiny_tokenizer, split)
    found = ATTACKS["lowercase"].score(gather(split.members, scores.members, lowered=scores.lowered_members))

    def perplexity(text):
        ids = torch.tensor(tiny_tokenizer(text, add_special_tokens=False).input_ids)[None]
        with torch.no_grad():
            return tiny_model(input_ids=ids, labels=ids).loss.exp().item()

    assert found[0] == pytest.approx(np.log(perplexity(texts[0].lower()) / perplexity(texts[0])), abs=1e-4)
    assert found[1] == 0.0
    assert found[2] == found[3] == -np.inf  # nothing is predicted of a single token


def test_min_k_plus_plus_is_the_papers_formula_over_the_full_softmax(tiny_model, tiny_tokenizer):
    """Moments from every logit of a plain forward pass in float64, the lowest fifth taken by sorting."""
    texts = ["Ann Lee called from 201-555-0133 at noon.", "a", "Card 4000 1234, thanks!"]
    found = ATTACKS["min-k++"].score(Evidence(score_records(tiny_model, tiny_tokenizer, [Record(t) for t in texts])))
    for text, value in zip(texts, found, strict=True):
        ids = torch.tensor(tiny_tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) < 2:
            assert value == -np.inf
            continue
        with torch.no_grad():
            logp = torch.log_softmax(tiny_model(input_ids=ids[None]).logits[0, :-1].double(), 1)
        mean = (logp.exp() * logp).sum(1)
        variance = (logp.exp() * (logp - mean[:, None]).square()).sum(1)
        z = (logp.gather(1, ids[1:, None])[:, 0] - mean) / variance.sqrt()
        assert value == pytest.approx(z.sort().values[: max(1, len(z) // 5)].mean().item(), abs=1e-3)


def test_a_sure_prediction_divides_by_no_rounding(target):
    sure = replace(target, std=target.std * 0, mean=target.log_prob)
    values = ATTACKS["min-k++"].score(Evidence(sure))
    np.testing.assert_array_equal(np.delete(values, 2), 0)


def test_a_reference_with_another_tokenizer_is_refused(target):
    other = made(np.random.default_rng(1), [*LENGTHS[:-1], 12])
    with pytest.raises(UserError, match="other tokens than the audited model"):
        ATTACKS["reference"].score(Evidence(target, other))

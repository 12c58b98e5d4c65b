"""Exposure against complete enumeration of the secret space."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import log2

import numpy as np
import pytest
import torch

from geoquant.data.private import decoy_records
from geoquant.data.records import Canary, Record
from geoquant.data.text import digit_tokens
from geoquant.errors import UserError
from geoquant.privacy.exposure import exact_exposure, exposure, walk_ranks
from geoquant.privacy.scoring import score_records


def canary(secret: str, repeats: int = 1) -> Record:
    return Record(f"pin {secret}.", canary=Canary(f"c{secret}", 4, 4 + len(secret), repeats))


def every_secret(model, tokenizer, digits: int) -> dict[str, float]:
    """log P of every secret, each by its own forward pass over its own text, restricted to digits."""
    ten = digit_tokens(tokenizer)
    secrets = ["".join(s) for s in product("0123456789", repeat=digits)]
    ids = torch.tensor([tokenizer(f"pin {s}").input_ids for s in secrets])
    with torch.no_grad():
        logits = torch.cat([model(input_ids=part).logits for part in ids.split(500)])
    start = ids.shape[1] - digits
    logp = torch.log_softmax(logits[:, start - 1 : -1][:, :, ten].double(), dim=-1)
    digit = torch.tensor([[int(d) for d in s] for s in secrets])
    return dict(zip(secrets, logp.gather(2, digit[:, :, None])[:, :, 0].sum(1).tolist(), strict=True))


@pytest.mark.parametrize("secret", ["042", "777", "910", "385"])
def test_exact_rank_and_bound_against_enumeration(tiny_model, tiny_tokenizer, secret):
    everything = every_secret(tiny_model, tiny_tokenizer, 3)
    assert np.exp(list(everything.values())).sum() == pytest.approx(1, abs=1e-5)
    rank = 1 + sum(value > everything[secret] for value in everything.values())
    exact = exact_exposure(tiny_model, tiny_tokenizer, canary(secret), budget=10**4)
    assert exact.bits == pytest.approx(log2(1000) - log2(rank))
    bound = exposure(score_records(tiny_model, tiny_tokenizer, [canary(secret)]), [canary(secret)])
    assert bound.estimator == "digits-bound"
    assert bound.mean_bits == pytest.approx(max(0, log2(1000) + everything[secret] / np.log(2)), abs=1e-3)
    assert bound.mean_bits <= exact.bits + 1e-6


def test_the_most_likely_secret_has_full_exposure(tiny_model, tiny_tokenizer):
    everything = every_secret(tiny_model, tiny_tokenizer, 3)
    best = max(everything, key=everything.get)
    assert exact_exposure(tiny_model, tiny_tokenizer, canary(best)).bits == pytest.approx(log2(1000))


def test_a_memorised_secret_is_found_in_few_passes(tiny_model, tiny_tokenizer):
    from geoquant.privacy.finetune import finetune

    records = [canary("493817", 4)]
    finetune(tiny_model, tiny_tokenizer, records, epochs=40, lr=1e-2, batch=4)
    bound = exposure(score_records(tiny_model, tiny_tokenizer, records), records)
    exact = exact_exposure(tiny_model, tiny_tokenizer, records[0], budget=60)
    assert exact.bits == pytest.approx(log2(10**6))
    assert 19 < bound.mean_bits <= exact.bits
    assert bound.canaries[0].repeats == 4
    assert bound.limit_bits == pytest.approx(log2(10**6))


def test_ranks_are_exact_where_the_probability_allows_it(tiny_model, tiny_tokenizer):
    """After half a training: some secrets certain, some likely, some not; every exact value against enumeration."""
    from geoquant.privacy.finetune import finetune

    records = [canary(secret) for secret in ("493", "118", "905", "226", "771")]
    finetune(tiny_model, tiny_tokenizer, records, epochs=30, lr=4e-3, batch=5)
    everything = every_secret(tiny_model, tiny_tokenizer, 3)
    scores = score_records(tiny_model, tiny_tokenizer, records)
    walked = walk_ranks(tiny_model, tiny_tokenizer, records, scores)
    found = exposure(scores, records, walked=walked)
    assert np.isfinite(walked).any()
    for record, one in zip(records, found.canaries, strict=True):
        own = everything[record.value(record.canary)]
        truth = log2(1000) - log2(1 + sum(value > own for value in everything.values()))
        if one.exact:
            assert one.bits == pytest.approx(truth)
        else:
            assert np.exp(own) < 1 / 100
            assert one.bits <= truth + 1e-6
    likely = max(everything, key=everything.get)
    assert np.exp(everything[likely]) < 0.51  # the five share what there is: none is certain, so walking was needed


def test_half_precision_does_not_lose_the_secret(tiny_model, tiny_tokenizer):
    """Batches of other sizes round otherwise: the secret's own path must survive every level all the same."""
    model = tiny_model.bfloat16()
    for secret in ("042", "777", "910", "385", "118"):
        found = exact_exposure(model, tiny_tokenizer, canary(secret), budget=10**4)
        assert 0 <= found.bits <= log2(1000)


def test_an_unlikely_secret_exceeds_the_budget(tiny_model, tiny_tokenizer):
    everything = every_secret(tiny_model, tiny_tokenizer, 3)
    worst = min(everything, key=everything.get)
    assert exact_exposure(tiny_model, tiny_tokenizer, canary(worst), budget=20) is None


def test_sampled_rank_agrees_with_enumeration(tiny_model, tiny_tokenizer):
    """Any tokenizer can be sampled; here the whole-record probability of all 100 secrets is also known."""
    texts = [canary(f"{n:02d}") for n in range(100)]
    sums = score_records(tiny_model, tiny_tokenizer, texts)
    sums = sums.record_sums(sums.log_prob)
    chosen = [int(np.argsort(-sums)[place]) for place in (0, 20, 80)]
    records = [texts[n] for n in chosen]
    decoys = decoy_records(records, 400, seed=1)
    found = exposure(
        score_records(tiny_model, tiny_tokenizer, records),
        records,
        score_records(tiny_model, tiny_tokenizer, decoys),
    )
    assert found.estimator == "sampled-rank"
    for one, number in zip(found.canaries, chosen, strict=True):
        truth = log2(100) - log2(1 + (sums > sums[number]).sum())
        assert one.ci[0] - 0.1 <= truth <= one.ci[1] + 0.1
        assert one.ci[0] <= one.bits <= one.ci[1]
    assert found.canaries[0].bits == pytest.approx(found.canaries[0].limit_bits)


def test_decoys_differ_from_the_secret_and_keep_the_rest():
    record = canary("12")
    decoys = decoy_records([record, canary("345")], 150, seed=0)
    assert len(decoys) == 300
    assert all(d.text != record.text and len(d.text) == len(record.text) for d in decoys[:150])
    assert all(d.text.startswith("pin ") and d.text.endswith(".") for d in decoys)
    assert len({d.text for d in decoys[:150]}) > 70
    assert decoys == decoy_records([record, canary("345")], 150, seed=0)


def test_what_cannot_be_measured_is_left_out(tiny_model, tiny_tokenizer):
    record = canary("493817")
    scores = score_records(tiny_model, tiny_tokenizer, [record, canary("123")], max_tokens=8)
    assert [c.name for c in exposure(scores, [record, canary("123")]).canaries] == ["c123"]
    assert exposure(score_records(tiny_model, tiny_tokenizer, [record], max_tokens=5), [record]) is None
    unmeasured = replace(scores, digit_mass=np.full_like(scores.digit_mass, np.nan))
    assert exposure(unmeasured, [record, canary("123")]) is None
    with pytest.raises(UserError, match="needs a canary"):
        exact_exposure(tiny_model, tiny_tokenizer, Record("no secret"))

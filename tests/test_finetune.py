"""The fine-tune: it learns its records, forgets less with public text, repeats itself exactly."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from geoquant.data.private import make_canaries, make_records
from geoquant.data.records import Record
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.privacy.finetune import _batches, _examples, _loss, _padded, finetune
from geoquant.privacy.scores import score_records

RECORDS = [Record(text) for text in ("the cat sat", "a dog ran off", "birds", "some fish swim by")]


def loss(model, tokenizer, records) -> float:
    return -float(score_records(model, tokenizer, records).log_prob.mean())


def test_it_learns_the_records_and_leaves_evaluation_mode(tiny_model, tiny_tokenizer):
    before = loss(tiny_model, tiny_tokenizer, RECORDS)
    seen = []
    finetune(
        tiny_model,
        tiny_tokenizer,
        RECORDS,
        epochs=40,
        lr=1e-2,
        batch=2,
        progress=lambda *step: seen.append(step),
    )
    assert loss(tiny_model, tiny_tokenizer, RECORDS) < 0.2 * before
    assert not tiny_model.training
    assert [step[1] for step in seen] == list(range(1, 81))
    assert seen[-1][0] == "finetune"
    assert seen[-1][2] == 80


def test_same_seed_same_weights_other_seed_other_weights(tiny_model, tiny_tokenizer):
    def run(seed):
        model = copy.deepcopy(tiny_model)
        torch.rand(seed + 1)  # the caller's generator must not matter
        finetune(model, tiny_tokenizer, RECORDS, epochs=2, lr=1e-3, batch=1, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_the_callers_random_state_is_untouched(tiny_model, tiny_tokenizer):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3)
    assert torch.equal(torch.rand(3), wanted)


def test_public_windows_keep_the_public_loss_down(tiny_model, tiny_tokenizer):
    public = [Record("ordinary text that everyone may read, again and again")]
    window = Windows(torch.tensor([tiny_tokenizer(public[0].text).input_ids]), "test", "")
    other = copy.deepcopy(tiny_model)
    finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=15, lr=1e-2, batch=2)
    finetune(other, tiny_tokenizer, RECORDS, epochs=15, lr=1e-2, batch=2, public_windows=window)
    assert loss(other, tiny_tokenizer, public) < 0.5 * loss(tiny_model, tiny_tokenizer, public)


def test_the_loss_is_the_mean_over_real_tokens_from_the_third_on(tiny_model, tiny_tokenizer):
    tokens, labels = _padded(_examples(tiny_tokenizer, RECORDS), padding=1)
    scores = score_records(tiny_model, tiny_tokenizer, RECORDS)
    scored = np.concatenate([scores.log_prob[a + 1 : b] for a, b in itertools.pairwise(scores.splits)])
    assert float(_loss(tiny_model, tokens, labels).detach()) == pytest.approx(-scored.mean(), rel=1e-5)


def test_repeats_count_and_every_example_is_seen_once_an_epoch(tiny_tokenizer):
    records = [*make_records(9, 0), *make_canaries(4, 1, repeats=(1, 4))]
    examples = _examples(tiny_tokenizer, records)
    assert len(examples) == 9 + 1 + 4 + 1 + 4
    batches = _batches([len(ids) for ids in examples], 4, torch.Generator().manual_seed(0))
    assert sorted(index for batch in batches for index in batch) == list(range(19))
    assert all(len(batch) <= 4 for batch in batches)


def test_nothing_to_learn_and_divergence_are_said(tiny_model, tiny_tokenizer):
    with pytest.raises(UserError, match="nothing to fine-tune on; got 0 records"):
        finetune(tiny_model, tiny_tokenizer, [], epochs=1, lr=1e-3)
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged at step 1"):
        finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3)

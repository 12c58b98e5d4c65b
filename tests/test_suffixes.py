"""Suffixes by one forward pass against stock greedy generation and stock sampling of a model that learned some."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoquant.data.records import Record
from geoquant.errors import UserError
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import clopper_pearson
from geoquant.privacy.suffixes import LONGEST, SHORTEST, suffix_extraction, written_suffixes

LEARNED = ["Ann Lee <ann47@x.org> asked", "Bob: 5550133, ok, by noon!", "Eve paid 12 for 340 pears", "Short one"]
UNSEEN = ["Zed Orr <qq81@y.net> went", "Kim: 0442907, no, tonight"]


@pytest.fixture(scope="module")
def trained(tiny_model_dir):
    """The tiny Llama, taught some texts well and one hardly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geoquant.privacy.finetune import finetune

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    taught = [Record(text) for text in (LEARNED[0], LEARNED[0], LEARNED[1], LEARNED[1], LEARNED[2])]
    finetune(model, tokenizer, taught, epochs=40, lr=1e-2, batch=5, seed=0)
    return model, tokenizer


def generated(model, ids: list[int], prefix: int) -> bool:
    """Greedy generation from the first `prefix` tokens, as an attacker would do it."""
    rest = ids[prefix : prefix + LONGEST]
    output = model.generate(
        torch.tensor([ids[:prefix]]),
        max_new_tokens=len(rest),
        min_new_tokens=len(rest),
        do_sample=False,
        pad_token_id=1,
    )
    return output[0, prefix:].tolist() == rest


@pytest.mark.parametrize("bos", [False, True])
def test_one_pass_decides_what_generate_writes(trained, bos):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model, tokenizer = trained
    if bos:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    texts = [*LEARNED, *UNSEEN, LEARNED[0] + " x" * 30]
    scores = score_records(model, tokenizer, [Record(text) for text in texts])
    seen = set()
    for prefix in (1, 2, 8, 12, 17):
        wanted = [
            (min(len(ids) - prefix, LONGEST), generated(model, ids, prefix))
            for ids in (tokenizer(text).input_ids for text in texts)
            if len(ids) - prefix >= SHORTEST
        ]
        found = written_suffixes(scores, prefix)
        assert [(length, tried.extracted) for length, tried in found] == wanted
        seen |= {hit for _, hit in wanted}
    assert bos or seen == {True, False}  # the test saw both


def test_rows_with_intervals_and_control(trained):
    model, tokenizer = trained
    inside, outside = (score_records(model, tokenizer, [Record(t) for t in side]) for side in (LEARNED, UNSEEN))
    rows = suffix_extraction(inside, outside, prefixes=(1, 8, 20, 40))
    assert [row.prefix for row in rows] == [1, 8]  # nothing is long enough for the others
    lengths = [len(text) - 8 for text in LEARNED[:3]]
    row = rows[1]
    assert (row.found.spans, row.found.control_spans, row.tokens) == (3, 2, pytest.approx(np.mean(lengths)))
    hits = sum(generated(model, tokenizer(text).input_ids, 8) for text in LEARNED[:3])
    assert hits >= 2
    assert (row.found.extracted, row.found.ci) == (hits, clopper_pearson(hits, 3))
    assert (row.found.control_extracted, row.found.control_ci) == (0, clopper_pearson(0, 2))
    # What one greedy try does not write, many drawn tries may.
    counts = list(row.found.sampled.values())
    assert counts == sorted(counts)


def test_counts_of_samples_are_those_of_drawing(trained):
    """The share of stock samples that hold the suffix is the probability from which the count was computed."""
    model, tokenizer = trained
    scores = score_records(model, tokenizer, [Record(LEARNED[2])])
    ids = tokenizer(LEARNED[2]).input_ids
    prefix = len(ids) - SHORTEST
    ((length, tried),) = written_suffixes(scores, prefix)
    assert length == SHORTEST
    torch.manual_seed(0)
    draws = model.generate(
        torch.tensor([ids[:prefix]]).expand(3000, -1),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=1,
    )
    share = (draws[:, prefix:] == torch.tensor(ids[prefix:])).all(1).double().mean().item()
    likely = 1 - 0.5 ** (1 / tried.samples) if tried.samples > 1 else None
    if likely is None:
        assert share > 0.5 - 5 * np.sqrt(0.25 / 3000)
    else:
        assert abs(share - likely) < 5 * np.sqrt(likely * (1 - likely) / 3000) + 0.005


def test_suffixes_by_hand():
    """Lengths on both sides of the limits; one wrong token anywhere in the suffix spoils it, none before or behind."""
    lengths = [7 + SHORTEST - 1, 7 + SHORTEST, 7 + LONGEST + 5, 7 + LONGEST + 5, 0]
    splits = np.concatenate([[0], np.cumsum(lengths)])
    correct = np.ones(splits[-1], bool)
    correct[splits[1] + 6] = False  # the last token of the prefix
    correct[splits[2] + 7 + LONGEST] = False  # behind the suffix
    correct[splits[3] + 7 + LONGEST - 1] = False  # its last token
    rest, places = np.full(len(correct), np.nan, np.float32), np.zeros(len(correct), int)
    scores = RecordScores(np.full(len(correct), -1.0), rest, rest, ~correct * 3, rest, places, places, splits)
    found = written_suffixes(scores, 8)
    assert [(length, tried.extracted) for length, tried in found] == [
        (SHORTEST, True),
        (LONGEST, True),
        (LONGEST, False),
    ]
    assert found[0][1].samples == pytest.approx(np.log(2) * np.exp(SHORTEST), rel=1e-3)


def test_a_prefix_of_nothing_is_refused(trained):
    model, tokenizer = trained
    scores = score_records(model, tokenizer, [Record("Ann")])
    with pytest.raises(UserError, match="at least one token"):
        suffix_extraction(scores, scores, prefixes=(8, 0))
    assert suffix_extraction(scores, scores) == ()

"""Extraction by one forward pass against stock greedy generation, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoquant.data.records import Record, Span
from geoquant.privacy.extraction import SAMPLES, extracted_spans, extraction, samples_needed
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records


@pytest.fixture(scope="module")
def trained(tiny_model_dir):
    """The tiny Llama, taught a few strings well enough that it writes parts of them by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geoquant.privacy.finetune import finetune

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    finetune(model, tokenizer, records(), epochs=80, lr=1e-2, batch=3, seed=0)
    return model, tokenizer


def records() -> list[Record]:
    """Three texts with spans of many places and lengths."""
    texts = ("Ann: ann47@x.org", "Bob: 5550133 ok", "Eve: note ééé 12")
    places = [(start, start + length) for start in range(1, 14, 2) for length in (1, 3)]
    spans = tuple(Span(f"s{start}-{end}", start, end) for start, end in places if end <= min(map(len, texts)))
    return [Record(text, spans) for text in texts]


def generated(model, tokenizer, record: Record, span: Span) -> bool:
    """Greedy generation from the true prefix, as an attacker would do it."""
    encoded = tokenizer(record.text, add_special_tokens=False, return_offsets_mapping=True)
    touching = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < span.end and b > span.start]
    prefix = encoded.input_ids[: touching[0]]
    output = model.generate(
        torch.tensor([prefix]),
        max_new_tokens=len(touching),
        min_new_tokens=len(touching),
        do_sample=False,
        pad_token_id=1,
    )
    return output[0, len(prefix) :].tolist() == [encoded.input_ids[i] for i in touching]


def test_one_pass_decides_exactly_what_generate_writes(trained):
    model, tokenizer = trained
    # The last record is unseen: its spans are (mostly) not extracted.
    everything = [*records(), Record("Zed: 9041 quiet", records()[0].fields)]
    scores = score_records(model, tokenizer, everything)
    found = extracted_spans(scores, everything)
    wanted = [
        (index, span.kind, generated(model, tokenizer, record, span))
        for index, record in enumerate(everything)
        for span in record.fields
    ]
    assert found == wanted
    decisions = {hit for _, _, hit in found}
    assert decisions == {True, False}  # the test saw both


def test_rates_by_kind_with_a_control(trained):
    model, tokenizer = trained
    inside = [Record(r.text, (Span("tail", 5, len(r.text)), Span("head", 1, 3))) for r in records()]
    outside = [Record(t, (Span("tail", 5, len(t)),)) for t in ("Zed: 9041 quiet", "Kim: qqq@z.net")]
    results = {
        part.kind: part
        for part in extraction(
            score_records(model, tokenizer, inside), score_records(model, tokenizer, outside), inside, outside
        )
    }
    assert set(results) == {"all", "head", "tail"}
    tail = results["tail"]
    assert (tail.spans, tail.extracted) == (3, 3)
    assert (tail.control_spans, tail.control_extracted, tail.control_rate) == (2, 0, 0.0)
    assert tail.ci == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert results["all"].spans == 6
    assert results["all"].extracted == tail.extracted + results["head"].extracted


def test_spans_that_cannot_be_measured_are_not_counted(tiny_model, tiny_tokenizer):
    record = Record("Ann: x", (Span("first", 0, 3), Span("rest", 5, 6)))
    scores = score_records(tiny_model, tiny_tokenizer, [record])
    assert [kind for _, kind, _ in extracted_spans(scores, [record])] == ["rest"]
    assert extraction(scores, scores, [Record("Ann: x")], [record]) == ()


def test_samples_needed_are_those_of_drawing(trained):
    """Spans drawn again and again by stock sampling: the share of n draws that hold it is the one that was computed."""
    model, tokenizer = trained
    inside = [Record(r.text, (Span("tail", 11, 13),)) for r in records()]
    scores = score_records(model, tokenizer, inside)
    torch.manual_seed(0)
    for index, record in enumerate(inside):
        encoded = tokenizer(record.text, add_special_tokens=False, return_offsets_mapping=True)
        touching = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < 13 and b > 11]
        prefix, wanted = encoded.input_ids[: touching[0]], [encoded.input_ids[i] for i in touching]
        draws = model.generate(
            torch.tensor([prefix]).expand(4000, -1),
            max_new_tokens=len(wanted),
            min_new_tokens=len(wanted),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=1,
        )
        share = (draws[:, len(prefix) :] == torch.tensor(wanted)).all(1).double().mean().item()
        p = np.exp(scores.log_prob[scores.covering(index, 11, 13)].astype(np.float64).sum())
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 0.005  # a suppressed end token moves p a little


def test_samples_needed_by_hand():
    values = {0.5: 1.0, 0.9: 1.0, 0.1: np.log(0.5) / np.log(0.9), 1e-3: 692.8, 1e-30: np.log(2) * 1e30}
    count = len(values)
    rest, ends = np.full(count, np.nan, np.float32), np.full(count, 3)
    scores = RecordScores(
        np.log(np.array(list(values))), rest, rest, np.zeros(count, bool), rest, 0 * ends, ends, np.arange(count + 1)
    )
    inside = [Record("abc", (Span("x", 0, 3),))] * count
    found = samples_needed(scores, inside)
    assert [n for _, n in found] == pytest.approx(list(values.values()), rel=1e-3)
    part = extraction(scores, scores, inside, inside)[0]
    assert part.sampled == part.control_sampled == {"1": 2, "100": 3, "10000": 4}
    assert tuple(map(int, part.sampled)) == SAMPLES

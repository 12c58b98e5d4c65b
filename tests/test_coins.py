"""The one-run audit on real scores: a tiny model trained on the canaries that coins chose, and one that saw none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geoquant import auditing
from geoquant.cli.audit import show
from geoquant.data.records import Split, load_split, write_records
from geoquant.data.synthetic import synthetic_records
from geoquant.privacy.audit import audit, merge
from geoquant.privacy.coins import audit_coins, candidates, most, secret_scores
from geoquant.privacy.finetune import finetune
from geoquant.privacy.one_run import epsilon_lower_bound
from geoquant.privacy.scores import RecordScores, SplitScores, load_scores, save_scores
from geoquant.privacy.scoring import score_split

CANARIES = 40


@pytest.fixture(scope="module")
def measured(tiny_model_dir):
    """Split with coins, scores before and after a fine-tune that saw what the coins put in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = synthetic_records("support", 100, 1, canaries=CANARIES, digits=6, repeats=(1,))
    split = replace(made.split, members=made.members[:12], nonmembers=made.nonmembers[:12])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = score_split(model, tokenizer, split)
    finetune(model, tokenizer, (*split.canaries, *split.withheld), epochs=60, lr=1e-2, batch=10)
    return split, base, score_split(model, tokenizer, split)


def test_what_was_trained_on_shows_and_what_never_was_does_not(measured):
    split, base, tuned = measured
    assert len(split.canaries) + len(split.withheld) == CANARIES
    before, after = audit_coins(base, None, split), audit_coins(tuned, base, split)
    assert before.epsilon == 0.0
    assert 0.5 < after.epsilon <= most(after)
    assert (after.m, after.candidates, after.confidence) == (CANARIES, 3, 0.95)


def test_the_score_is_the_log_probability_of_the_secret_among_digits(measured):
    split, _, tuned = measured
    found = secret_scores(tuned.canaries, split.canaries)
    for index, record in enumerate(split.canaries[:5]):
        part = tuned.canaries.covering(index, record.canary.start, record.canary.end)
        expected = sum(
            float(p) - float(m) for p, m in zip(tuned.canaries.log_prob[part], tuned.canaries.digit_mass[part])
        )
        assert found[index] == pytest.approx(expected)


def scores_of(values):
    """One token a record, which is its secret, with these log-probabilities; no digits are tokens."""
    count = len(values)
    ends, rest = np.full(count, 6), np.full(count, np.nan, np.float32)
    given = np.asarray(values, np.float32)
    return RecordScores(
        given, rest, rest, np.zeros(count, bool), rest, np.zeros(count, int), ends, np.arange(count + 1)
    )


def split_of(inside, outside, record):
    def canaries(count, included):
        return tuple(replace(record, canary=replace(record.canary, included=included)) for _ in range(count))

    return Split((), (), canaries(inside, True), canaries(outside, False))


@pytest.fixture(scope="module")
def canary(measured):
    record = measured[0].canaries[0]
    return replace(record, text="123456", canary=replace(record.canary, start=0, end=6))


def test_it_is_above_the_truth_no_more_often_than_it_says(canary):
    """A model whose scores know nothing of the coins: epsilon 0. 200 audits at 95%, at most 19 misses (p < 0.005)."""
    rng, misses = np.random.default_rng(0), 0
    for _ in range(200):
        inside = int((rng.random(100) < 0.5).sum())
        target = SplitScores(
            None, None, scores_of(rng.normal(size=inside)), withheld=scores_of(rng.normal(size=100 - inside))
        )
        misses += audit_coins(target, None, split_of(inside, 100 - inside, canary)).epsilon > 0
    assert misses <= 19


def test_the_reference_takes_away_what_makes_a_secret_likely_for_everybody(canary):
    rng = np.random.default_rng(1)
    base = [rng.normal(scale=20.0, size=60) for _ in range(2)]
    target = SplitScores(None, None, scores_of(base[0] + 1.0), withheld=scores_of(base[1]))
    reference = SplitScores(None, None, scores_of(base[0]), withheld=scores_of(base[1]))
    split = split_of(60, 60, canary)
    alone, compared = audit_coins(target, None, split), audit_coins(target, reference, split)
    assert alone.epsilon < 0.5
    assert compared.epsilon == most(compared)
    assert compared.correct == compared.guesses


def test_the_most_that_can_be_shown_is_that_of_right_guesses(canary):
    bound = audit_coins(
        SplitScores(None, None, scores_of([1.0] * 50), withheld=scores_of([0.0] * 50)), None, split_of(50, 50, canary)
    )
    assert most(bound) == epsilon_lower_bound(100, 100, 100, delta=bound.delta, confidence=1 - 0.05 / 3)
    assert candidates(1) == [(1, 0)]


def test_without_coins_there_is_no_bound(measured):
    split, base, _ = measured
    certain = tuple(replace(r, canary=replace(r.canary, included=None)) for r in split.canaries)
    assert audit_coins(replace(base, withheld=None), None, replace(split, withheld=())) is None
    assert audit_coins(base, None, replace(split, canaries=certain)) is None


def test_files_keep_who_was_withheld_and_old_hashes_stay(measured, tmp_path):
    split, base, _ = measured
    for name, records in (
        ("in", split.members),
        ("out", split.nonmembers),
        ("all", (*split.canaries, *split.withheld)),
    ):
        write_records(tmp_path / f"{name}.jsonl", records)
    read = load_split(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "all.jsonl")
    assert [r.text for r in read.withheld] == [r.text for r in split.withheld]
    assert read.sha256 == split.sha256 != replace(split, withheld=()).sha256
    save_scores(tmp_path / "scores.safetensors", base, split)
    kept = load_scores(tmp_path / "scores.safetensors", split)
    assert np.array_equal(kept.withheld.log_prob, base.withheld.log_prob, equal_nan=True)


def test_the_line_says_what_it_is_about(measured, tiny_model_dir, tmp_path, capsys):
    split, base, tuned = measured
    found = merge([audit("base", base, None, split), audit("original", tuned, base, split)]).to_dict()
    assert [row["subject"] for row in found["one_run"]] == ["base", "original"]
    assert "adjacency" in found["one_run"][0]["covers"]
    show(found)
    text = " ".join(capsys.readouterr().out.split())
    assert "epsilon at least" in text
    assert "one canary in or out" in text
    assert "a lower bound, never an upper one" in text
    for name, records in (
        ("in", split.members),
        ("out", split.nonmembers),
        ("all", (*split.canaries, *split.withheld)),
    ):
        write_records(tmp_path / f"{name}.jsonl", records)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("in", "out")]
    whole = auditing.audit(str(tiny_model_dir), *files, canaries=str(tmp_path / "all.jsonl"))
    assert whole["one_run"][0]["epsilon"] == 0.0

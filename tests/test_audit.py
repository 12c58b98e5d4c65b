"""The audit end to end on a tiny model that was really trained on its members."""

from __future__ import annotations

import json

import pytest
import torch

from geoquant.data.private import make_canaries, make_records
from geoquant.data.records import Record, Split
from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.audit import audit, merge
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scores import score_split


@pytest.fixture(scope="module")
def measured(tiny_model_dir):
    """Split, base scores and scores after a fine-tune on the members and canaries."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pool = make_records(24, 3)
    split = Split(tuple(pool[::2]), tuple(pool[1::2]), tuple(make_canaries(2, 4, digits=4)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = score_split(model, tokenizer, split)
    finetune(model, tokenizer, (*split.members, *split.canaries), epochs=25, lr=1e-2, batch=7)
    return split, base, score_split(model, tokenizer, split)


@pytest.fixture(scope="module")
def report(measured):
    split, base, tuned = measured
    return merge([audit("base", base, None, split), audit("original", tuned, base, split)])


def test_training_shows_and_its_absence_does_not(report):
    for name in ATTACKS:
        assert report.attack(name, "original").auc > 0.8
    low, high = report.attack("loss", "base").ci
    assert low < 0.5 < high
    assert report.attack("reference", "base") is None
    exposures = dict(report.exposure)
    assert exposures["original"].mean_bits > exposures["base"].mean_bits + 2


def test_the_report_is_the_contract_and_plain_json(report, measured):
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == {
        "attacks", "extraction", "exposure", "guarantee", "n_members", "n_nonmembers", "warnings",
    }  # fmt: skip
    assert data["guarantee"] is None
    assert (data["n_members"], data["n_nonmembers"]) == (12, 12)
    attack = data["attacks"][-1]
    assert set(attack) == {"name", "subject", "auc", "ci", "tpr_at_fpr", "roc"}
    assert set(attack["tpr_at_fpr"]) == {"0.01"}
    assert set(attack["tpr_at_fpr"]["0.01"]) == {"tpr", "ci"}
    assert attack["ci"][0] <= attack["auc"] <= attack["ci"][1]
    assert len(attack["roc"]["fpr"]) == len(attack["roc"]["tpr"]) <= 100
    assert {"subject", "kind", "spans", "extracted", "rate", "ci", "control_rate"} <= set(data["extraction"][0])
    assert {part["kind"] for part in data["extraction"]} >= {"all", "note", "name"}
    assert set(data["exposure"][0]) == {"subject", "canaries", "mean_bits", "limit_bits", "estimator"}
    assert {"name", "repeats", "bits"} <= set(data["exposure"][0]["canaries"][0])


def test_the_words_promise_nothing(report):
    text = json.dumps(report.to_dict()).lower()
    for word in ("safe", "anonym", "complian", "epsilon", "protected"):
        assert word not in text


def test_low_resolution_is_said(report):
    assert any("12 non-members cannot resolve 1%" in warning for warning in report.warnings)
    assert len(report.warnings) == 1  # both subjects say it, the merged audit once


def test_missing_parts_are_said(measured):
    split, _, tuned = measured
    from dataclasses import replace

    bare = Split(tuple(Record(r.text) for r in split.members), tuple(Record(r.text) for r in split.nonmembers))
    result = audit("original", replace(tuned, canaries=None), None, bare)
    assert any("no marked private spans" in warning for warning in result.warnings)
    assert any("no canaries" in warning for warning in result.warnings)
    assert result.extraction == ()
    assert result.exposure == ()
    assert [a.name for a in result.attacks] == ["loss", "min-k"]


def test_scores_of_other_records_are_refused(measured):
    split, base, tuned = measured
    other = Split(split.members[:9], split.nonmembers, split.canaries)
    with pytest.raises(UserError, match=r"got scores of 12 \+ 12 records; wanted 9 \+ 12"):
        audit("original", tuned, base, other)


def test_the_same_scores_give_the_same_audit(measured):
    split, base, tuned = measured
    assert audit("original", tuned, base, split, seed=1) == audit("original", tuned, base, split, seed=1)

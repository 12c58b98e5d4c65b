"""The audit end to end on a tiny model that was really trained on its members."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from geoquant import auditing
from geoquant.data.private import make_canaries, make_records
from geoquant.data.records import Record, Split
from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.audit import audit, merge
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scoring import score_split
from geoquant.privacy.statistics import holm
from geoquant.privacy.validity import check_sides


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
        "attacks", "extraction", "exposure", "guarantee", "n_members", "n_nonmembers", "warnings", "comparisons",
        "verdict", "no_verdict", "gate", "near_duplicates", "one_run", "prompted", "suffixes", "shadows",
    }  # fmt: skip
    assert data["guarantee"] is None
    assert (data["n_members"], data["n_nonmembers"]) == (12, 12)
    entry = data["attacks"][-1]
    assert set(entry) == {"name", "subject", "auc", "ci", "ci_delong", "p", "p_holm", "tpr_at_fpr", "roc"}
    assert set(entry["tpr_at_fpr"]) == {"0.1", "0.01", "0.001"}
    assert set(entry["tpr_at_fpr"]["0.1"]) == {"tpr", "ci", "fpr_ci", "needed"}
    assert entry["ci"][0] <= entry["auc"] <= entry["ci"][1]
    assert entry["ci_delong"][0] <= entry["auc"] <= entry["ci_delong"][1]
    assert entry["p"] <= entry["p_holm"] <= 1
    assert len(entry["roc"]["fpr"]) == len(entry["roc"]["tpr"]) <= 100
    assert {"subject", "kind", "spans", "extracted", "rate", "ci", "control_rate"} <= set(data["extraction"][0])
    assert {part["kind"] for part in data["extraction"]} >= {"all", "note", "name"}
    assert set(data["exposure"][0]) == {"subject", "canaries", "mean_bits", "limit_bits", "estimator"}
    assert {"name", "repeats", "bits"} <= set(data["exposure"][0]["canaries"][0])


def test_the_words_promise_nothing(report):
    text = json.dumps(report.to_dict()).lower()
    for word in ("safe", "anonym", "complian", "epsilon", "protected"):
        assert word not in text


def test_low_resolution_is_said_and_shown(report):
    """12 non-members: one may be accused at 10%; 1% and 0.1% do not exist."""
    assert report.warnings == (  # both subjects say it, the merged audit once
        "12 non-members cannot resolve 1% and 0.1% FPR (at least 100 and 1000 are needed): no TPR is given there",
        "the threshold of 10% FPR is set by 1 of 12 non-members: its true rate is anywhere from 2.1% to 38%",
    )
    for attack in report.attacks:
        assert attack.tpr_at_fpr["0.1"].tpr is not None
        for rate, needed in (("0.01", 100), ("0.001", 1000)):
            assert attack.tpr_at_fpr[rate].tpr is None
            assert attack.tpr_at_fpr[rate].ci is None
            assert attack.tpr_at_fpr[rate].needed == needed


def test_attacks_are_corrected_for_one_another_on_each_model(report):
    for subject in ("base", "original"):
        found = [attack for attack in report.attacks if attack.subject == subject]
        assert [attack.p_holm for attack in found] == pytest.approx(holm([attack.p for attack in found]))
        assert len(found) == len(ATTACKS) - (subject == "base") + 1  # and the combination


def test_models_are_compared_on_the_same_records(report):
    """All attacks but the one that the base cannot have, and the combination, whose scores are fitted to the records;
    training makes each of them stronger, and surely so."""
    found = report.to_dict()["comparisons"]
    assert [row["attack"] for row in found] == [name for name in ATTACKS if name != "reference"]
    for row in found:
        assert (row["from"], row["to"]) == ("base", "original")
        before, after = (report.attack(row["attack"], subject) for subject in ("base", "original"))
        assert row["difference"] == pytest.approx(after.auc - before.auc)
        assert row["difference"] == pytest.approx(paired_difference(before.scores, after.scores).value)
    assert min(row["p_holm"] for row in found) < 0.05


def test_the_verdict_says_what_was_tested(measured, report):
    assert report.verdict()[1]["separates"]
    assert report.attack(report.verdict()[1]["attack"], "original").p_holm <= 0.05
    assert report.verdict()[0]["subject"] == "base"
    assert not report.verdict()[0]["separates"]


def test_records_that_differ_without_a_model_get_no_verdict(measured):
    """A date that only members bear: the numbers stay, what they would be taken for does not."""
    split, base, tuned = measured
    marked = Split(tuple(Record(f"2019: {r.text}") for r in split.members), split.nonmembers, split.canaries)
    check = check_sides(marked)
    result = merge([audit("base", base, None, split), audit("original", tuned, base, split)], check)
    data = result.to_dict()
    assert not data["gate"]["valid"]
    assert data["verdict"] is None
    assert "can be told apart by a single word alone, without any model" in data["no_verdict"]
    assert f"blind AUC {data['gate']['auc']:.2f}" in data["no_verdict"]
    for entry in (*data["attacks"], *data["comparisons"]):
        assert entry["p"] is None
        assert entry["p_holm"] is None
    assert data["attacks"][-1]["auc"] == result.attacks[-1].auc


def test_good_records_get_one(measured):
    split, base, tuned = measured
    data = auditing.attack(split, {"base": base, "original": tuned, "quantized": None}, 0)
    assert data["gate"]["valid"]
    assert data["no_verdict"] is None
    assert [entry["subject"] for entry in data["verdict"]] == ["base", "original"]
    assert data["near_duplicates"] == {"threshold": 0.7, "pairs": 0, "nonmembers": 0, "first": []}
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_near_duplicates_are_named(measured):
    split, _, tuned = measured
    copied = (*split.nonmembers[:-1], Record(split.members[4].text.replace(" ", " the ", 1)))
    result = merge([audit("original", tuned, None, split)], check_sides(replace(split, nonmembers=copied)))
    assert any("1 non-member is nearly the same as a member" in w and "record 12 like member 5" in w
               for w in result.warnings)  # fmt: skip
    assert result.to_dict()["near_duplicates"]["first"][0][:2] == [5, 12]


def test_missing_parts_are_said(measured):
    split, _, tuned = measured
    bare = Split(tuple(Record(r.text) for r in split.members), tuple(Record(r.text) for r in split.nonmembers))
    result = audit("original", replace(tuned, canaries=None), None, bare)
    assert any("no marked private spans" in warning for warning in result.warnings)
    assert any("no canaries" in warning for warning in result.warnings)
    assert result.extraction == ()
    assert result.exposure == ()
    assert [a.name for a in result.attacks] == [*(name for name in ATTACKS if name != "reference"), "combined"]


def test_scores_of_other_records_are_refused(measured):
    split, base, tuned = measured
    other = Split(split.members[:9], split.nonmembers, split.canaries)
    with pytest.raises(UserError, match=r"got scores of 12 \+ 12 records; wanted 9 \+ 12"):
        audit("original", tuned, base, other)


def test_the_same_scores_give_the_same_audit(measured):
    split, base, tuned = measured
    assert audit("original", tuned, base, split, seed=1) == audit("original", tuned, base, split, seed=1)

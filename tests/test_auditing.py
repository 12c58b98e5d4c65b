"""`geoquant.audit` as its callers meet it: folders and models in memory, scores that are kept, a page to sign."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch

import geoquant
from geoquant.cli import run
from geoquant.data.private import make_records
from geoquant.data.records import Canary, Record, write_records
from geoquant.errors import UserError
from geoquant.model.identity import model_hash
from geoquant.privacy.finetune import finetune
from geoquant.report.audit import render
from geoquant.report.page import fingerprint

POOL = make_records(40, 5)
random.Random(0).shuffle(POOL)
MEMBERS, NONMEMBERS = tuple(POOL[:20]), tuple(POOL[20:])


@pytest.fixture(scope="module")
def taught(tiny_model_dir, tmp_path_factory):
    """Folder of the tiny model after a fine-tune on the members."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("taught")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    finetune(model, tokenizer, MEMBERS, epochs=25, lr=1e-2, batch=7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    for name, records in (("in", MEMBERS), ("out", NONMEMBERS)):
        write_records(tmp_path / f"{name}.jsonl", records)
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def numbers(found: dict) -> dict:
    """All that must not depend on when and how it was measured."""
    return {
        key: found[key]
        for key in ("attacks", "comparisons", "extraction", "prompted", "suffixes", "exposure", "verdict", "gate")
    }


def counting(monkeypatch) -> list:
    """The lists of texts that a model is really asked about from here on."""
    from geoquant.privacy import scoring

    asked, scored = [], scoring._scored
    monkeypatch.setattr(scoring, "_scored", lambda *given: asked.append(given[2]) or scored(*given))
    return asked


def test_a_model_in_memory_and_its_folder_are_audited_alike(taught, files, tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_folder = geoquant.audit(taught, *files, reference=tiny_model_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    of_model = geoquant.audit(model, MEMBERS, NONMEMBERS, tokenizer=tokenizer, reference=str(tiny_model_dir))
    assert numbers(of_model) == numbers(of_folder)
    assert of_model["models"]["original"]["sha256"] == of_folder["models"]["original"]["sha256"]
    best = {attack["name"]: attack["auc"] for attack in of_folder["attacks"] if attack["subject"] == "original"}
    assert best["reference"] > 0.9
    texts = geoquant.audit(model, [r.text for r in MEMBERS], [r.text for r in NONMEMBERS], tokenizer=tokenizer)
    assert texts["extraction"] == []  # bare texts mark nothing
    assert next(a["auc"] for a in texts["attacks"] if a["name"] == "loss") == best["loss"]


def test_scores_are_kept_by_content(taught, files, tiny_model_dir, tmp_path, monkeypatch):
    asked = counting(monkeypatch)
    settings = {"reference": tiny_model_dir, "out": tmp_path / "audit"}
    first = geoquant.audit(taught, *files, **settings)
    assert len(asked) == 12  # two models, two sides, as written, in lower case and as prompts
    again = geoquant.audit(taught, *files, **settings)
    assert len(asked) == 12
    assert numbers(again) == numbers(first)
    # One more text on one side: that side is measured again, and nothing else.
    write_records(files[1], (*NONMEMBERS, make_records(41, 6)[40]))
    geoquant.audit(taught, *files, **settings)
    assert len(asked) == 18
    # Other weights under the same name are another model.
    import shutil

    shutil.copytree(taught, tmp_path / "model")
    write_records(files[1], NONMEMBERS)
    geoquant.audit(tmp_path / "model", *files, **settings)
    assert len(asked) == 18
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    geoquant.audit(tmp_path / "model", *files, **settings)
    assert len(asked) == 24


def test_kept_scores_hold_no_text(taught, files, tmp_path):
    geoquant.audit(taught, *files, out=tmp_path / "audit")
    raw = b"".join(path.read_bytes() for path in (tmp_path / "audit" / "scores").iterdir())
    for record in MEMBERS:
        for span in record.fields:
            assert record.value(span).encode() not in raw


def test_a_damaged_file_of_scores_is_named(taught, files, tmp_path):
    geoquant.audit(taught, *files, out=tmp_path / "audit")
    path = next((tmp_path / "audit" / "scores").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=path.name):
        geoquant.audit(taught, *files, out=tmp_path / "audit")


def test_two_models_are_compared_record_by_record(taught, files, tiny_model_dir):
    found = geoquant.audit(taught, *files, against=tiny_model_dir)
    loss = next(row for row in found["comparisons"] if row["attack"] == "loss")
    assert (loss["from"], loss["to"]) == ("against", "original")
    assert loss["difference"] > 0.2
    assert loss["p_holm"] < 0.01
    same = geoquant.audit(taught, *files, against=taught)
    assert all(row["difference"] == 0 for row in same["comparisons"])
    assert not any(row["p_holm"] < 1 for row in same["comparisons"])


def test_the_page_says_who_attacked_what_and_how(taught, files, tiny_model_dir, tmp_path):
    out = tmp_path / "audit"
    base, (inside, outside) = str(tiny_model_dir), map(str, files)
    sides = ("--members", inside, "--nonmembers", outside)
    assert run(["audit", str(taught), *sides, "--reference", base, "--against", base, "--out", str(out)]) == 0
    found = json.loads((out / "audit.json").read_text())
    page = (out / "audit.html").read_text()
    for words in ("Threat model", "The attacker holds the weights", "Negative controls", "What was not tested"):
        assert words in page
    for value in (found["records"]["sha256"], *(model["sha256"] for model in found["models"].values())):
        assert value in page
    assert fingerprint(found) in page
    assert "No formal guarantee" in page
    assert "Public base" in page
    assert "Compared with" in page
    assert not any(word in page.lower() for word in ("anonymous", "compliant", "is safe", "guaranteed"))
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json", "scores"]


def test_shadow_models_join_the_audit_and_are_kept(taught, files, tiny_model_dir, tmp_path, monkeypatch):
    from geoquant.privacy import shadows

    trained = []
    train = shadows.finetune
    monkeypatch.setattr(shadows, "finetune", lambda *given, **settings: trained.append(1) or train(*given, **settings))
    settings = {
        "reference": tiny_model_dir,
        "out": tmp_path / "audit",
        "train_shadows": 4,
        "shadow_settings": shadows.ShadowSettings(epochs=25, learning_rate=1e-2, batch=7),
    }
    found = geoquant.audit(taught, *files, **settings)
    assert len(trained) == 4
    best = {attack["name"]: attack["auc"] for attack in found["attacks"] if attack["subject"] == "original"}
    assert best["lira"] > 0.9
    assert best["rmia"] > 0.9
    base = {attack["name"]: attack for attack in found["attacks"] if attack["subject"] == "base"}
    assert base["lira"]["p_holm"] > 0.05  # a negative control: it saw no record
    assert len(found["shadows"]["models"]) == 4
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "They have trained 4 models of their own" in page
    again = geoquant.audit(taught, *files, **settings)
    assert len(trained) == 4
    assert numbers(again) == numbers(found)
    for lacking in ("reference", "out"):
        with pytest.raises(UserError, match="shadow models are trained from a base"):
            geoquant.audit(taught, *files, **settings | {lacking: None})


def test_a_hostile_name_cannot_run_anything(taught, files):
    found = geoquant.audit(taught, *files)
    found["models"]["original"]["name"] = "<script>alert(1)</script>"
    assert "<script>alert" not in render(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "no-such-folder-here"}, "no model at"),
        ({"against": "no-such-folder-here"}, "no model at"),
        ({"members": []}, "no members"),
        ({"members": ["text"] * 9 + [""]}, "record 10"),
        ({"members": ["one", "two"]}, "too few members"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_audited_is_said_at_once(taught, tmp_path, change, words):
    given = {"model": taught, "members": MEMBERS, "nonmembers": NONMEMBERS, "out": tmp_path / "audit"} | change
    with pytest.raises(UserError, match=words):
        geoquant.audit(**given)
    assert not (tmp_path / "audit").exists()


def test_a_model_in_memory_needs_its_own_tokenizer(tiny_model, tiny_tokenizer, taught):
    with pytest.raises(UserError, match="tokenizer"):
        geoquant.audit(tiny_model, MEMBERS, NONMEMBERS)
    tiny_model.resize_token_embeddings(100)
    with pytest.raises(UserError, match="not this model's"):
        geoquant.audit(tiny_model, MEMBERS, NONMEMBERS, tokenizer=tiny_tokenizer)


def of_other_tokens(folder, model_dir):
    """The model with a tokenizer that takes "er" for one token."""
    shutil.copytree(model_dir, folder)
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["vocab"]["er"] = len(rules["model"]["vocab"])
    rules["model"]["merges"] = [["e", "r"]]
    path.write_text(json.dumps(rules))
    return folder


def test_a_reference_of_another_tokenizer_is_refused_before_any_model_is_asked(
    taught, files, tiny_model_dir, tmp_path, monkeypatch
):
    other, asked = of_other_tokens(tmp_path / "other", tiny_model_dir), counting(monkeypatch)
    words = re.escape(f"the reference {other} cuts the records into other tokens than {taught}")
    with pytest.raises(UserError, match=words):
        geoquant.audit(taught, *files, reference=other)
    with pytest.raises(UserError, match=re.escape(f"other tokens than {other}")):
        geoquant.audit(taught, *files, reference=tiny_model_dir, against=other)
    assert not asked
    geoquant.audit(taught, *files, against=other)  # compared by record, which needs no common tokens
    assert asked


@pytest.mark.parametrize("export", ["model", "coded"])
def test_a_run_is_audited_with_a_reference_and_against_another(taught, files, tiny_model_dir, tmp_path, export):
    run = tmp_path / "run"
    shutil.copytree(taught, run / export)
    (run / "manifest.json").write_text("{}")
    found = geoquant.audit(run, *files, reference=tiny_model_dir, against=taught)
    assert found["models"]["original"]["name"] == "run"  # every run holds a "model"
    assert {change["difference"] for change in found["comparisons"] if change["from"] == "against"} == {0.0}
    assert numbers(geoquant.audit(run / export, *files, reference=tiny_model_dir, against=taught)) == numbers(found)


def test_coins_that_cannot_be_fair_are_refused_before_any_model_is_asked(taught, files, monkeypatch):
    asked = counting(monkeypatch)
    coins = [Record(f"pin {1000 + n}", canary=Canary(f"c{n}", 4, 8, int(n == 0), n == 0)) for n in range(60)]
    with pytest.raises(UserError, match="not included by fair coins; got 1 of 60 in"):
        geoquant.audit(taught, *files, canaries=coins)
    assert not asked


def test_a_destroyed_model_is_named_and_leaves_no_scores(tiny_model, tiny_tokenizer, tmp_path):
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        geoquant.audit(tiny_model, MEMBERS, NONMEMBERS, tokenizer=tiny_tokenizer, out=tmp_path / "audit")
    assert not list((tmp_path / "audit" / "scores").iterdir())
    assert not (tmp_path / "audit" / "audit.json").exists()


def test_a_folder_with_other_things_is_not_written_to(taught, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        geoquant.audit(taught, MEMBERS, NONMEMBERS, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        geoquant.audit(taught, MEMBERS, NONMEMBERS, out=tmp_path / "thesis.txt")


def test_the_hash_of_a_model_sees_every_weight_and_what_shapes_the_output(tiny_model):
    before = model_hash(tiny_model)
    assert model_hash(tiny_model) == before
    tiny_model.config._name_or_path = "elsewhere"
    assert model_hash(tiny_model) == before
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    changed = model_hash(tiny_model)
    assert changed != before
    tiny_model.config.rms_norm_eps *= 2
    assert model_hash(tiny_model) != changed


def test_the_gate_is_asked_before_a_long_run(taught, files):
    """`plan` tells whether an audit of these records will be able to say anything."""
    from geoquant.pipeline import make_plan
    from geoquant.recipe import Recipe

    text = files[0].parent / "text.txt"
    text.write_text("Some words to calibrate on, again and again. " * 400)
    recipe = Recipe(
        model=str(taught), bits=4, group_size=16, windows=4, window=64, evaluation_windows=2, calibration=str(text),
        evaluation=str(text), members=str(files[0]), nonmembers=str(files[1]),
    )  # fmt: skip
    assert not [warning for warning in make_plan(recipe)["warnings"] if "verdict" in warning]
    write_records(files[0], make_records(60, 1))
    files[1].write_text("".join(json.dumps({"text": f"{i} apples {'pears ' * (i % 7)}"}) + "\n" for i in range(60)))
    warnings = make_plan(recipe)["warnings"]
    assert [warning for warning in warnings if warning.startswith("the audit will give no verdict")]

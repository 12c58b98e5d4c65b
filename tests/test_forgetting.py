"""Forgetting in a run: the model that is compressed is the one that forgot, and the run says so."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import taught_by_heart
from geoquant.data.private import make_records
from geoquant.data.records import Record, read_records, write_records
from geoquant.errors import UserError
from geoquant.forgetting import HALFWAY, divided
from geoquant.lending import lendable
from geoquant.measure import prepare_texts
from geoquant.model.load import load
from geoquant.observe.texts import Sequences, padded
from geoquant.pipeline import quantize
from geoquant.privacy.forget import LEVEL, ForgetSettings, forget
from geoquant.privacy.refine.material import Material, observe_original, record_losses
from geoquant.privacy.scoring import encode
from geoquant.recipe import checked
from geoquant.report.control import control_sentences

SHORT = {"windows": 4, "window": 32, "evaluation_windows": 2, "compute": "float32", "verify": False}

pytestmark = pytest.mark.usefixtures("constant_machine")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Records for the levers and others for the audit, of one kind."""
    place = tmp_path_factory.mktemp("records")
    made = make_records(112, seed=4)
    parts = {"private": made[:12], "domain": made[12:32], "members": made[32:72], "nonmembers": made[72:]}
    for name, records in parts.items():
        write_records(place / f"{name}.jsonl", records)
    return {name: str(place / f"{name}.jsonl") for name in parts}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model_dir, sides):
    return taught_by_heart(tiny_model_dir, sides["private"], tmp_path_factory.mktemp("tuned") / "model")


def recipe(tuned, base, sides, **values):
    given = {name: sides[name] for name in ("private", "domain")}
    return checked({"model": str(tuned), "base": str(base), **SHORT, **given, **values})


@pytest.fixture(scope="module")
def forgot(tuned, tiny_model_dir, sides, tmp_path_factory):
    """Played once; read only."""
    folder = tmp_path_factory.mktemp("forgot") / "run"
    asked = recipe(tuned, tiny_model_dir, sides, forget=2, members=sides["members"], nonmembers=sides["nonmembers"])
    return asked, folder, quantize(asked, folder)


def tensors(folder):
    return load_file(folder / "model.safetensors")


@given(st.integers(8, 500))
def test_every_record_serves_the_function_or_the_levels(count):
    records = [Record(f"record {number}") for number in range(count)]
    function, strangers = divided([*records, Record(" record 0\n"), records[-1]])
    assert {one.text for one in function + strangers} == {one.text for one in records}
    assert len(function + strangers) == count
    assert function == [one for one in records if one not in strangers]
    if count <= 128:
        assert strangers == records[1::2]
    else:
        assert 64 <= len(strangers) <= 97
        places = [records.index(one) for one in strangers]
        assert len({b - a for a, b in itertools.pairwise(places)}) == 1


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_a_run_compresses_the_very_model_that_forgot(tuned, tiny_model_dir, sides, forgot, tmp_path, anchor):
    """Made once more of the parts; after an anchor the function is that of the model before it."""
    asked, run, report = forgot
    if anchor:
        asked = recipe(tuned, tiny_model_dir, sides, forget=2, anchor=anchor, aim="everything")
        run = tmp_path / "run"
        report = quantize(asked, run)
    target, base = load(str(tuned)), load(str(tiny_model_dir))

    def text(records):
        return padded([ids for ids, _ in encode(target.tokenizer, records, 256)], target.tokenizer.pad_token_id)

    public = prepare_texts(target.tokenizer, asked).calibration.tokens[:16]
    private, domain = (read_records(sides[name]) for name in ("private", "domain"))
    texts = {"domain": text(domain[::2]), "private": text(private), LEVEL: text(domain[1::2])}
    material = Material(
        {"public": Sequences(public, torch.full((len(public),), public.shape[1])), **texts},
        base={name: record_losses(base.model, own) for name, own in texts.items()},
    )
    material, head = observe_original(target.model, material), None
    if anchor:
        head = target.model.get_output_embeddings().weight.detach().clone()
        theirs = dict(base.model.named_parameters())
        for name, own in target.model.named_parameters():
            own.data = own.data.lerp(theirs[name].data, anchor)
    said = forget(target.model, material, ForgetSettings(2), original=head)
    kept = tensors(run / "protected")
    for name, own in target.model.state_dict().items():
        if name in kept:
            assert torch.allclose(own, kept[name], atol=1e-5), name
    told = report["protection"]
    assert (told["lever"], told["guarantee"]) == ("anchor" if anchor else "forget", None)
    assert told["forgot"]["after"]["attack"] == pytest.approx(said.after.attack, abs=0.02)
    assert told["forgot"]["sequences"] == {"public": 4, "domain": 10, "private": 12, LEVEL: 10}
    mine, its = tensors(tuned), tensors(tiny_model_dir)
    length = sum((kept[name] - its[name]).double().square().sum() for name in kept).sqrt().item()
    assert told["forgot"]["distance"]["after"] == pytest.approx(length, rel=1e-5)
    length = sum((mine[name] - its[name]).double().square().sum() for name in kept).sqrt().item()
    assert told["distance"]["before"] == pytest.approx(length, rel=1e-5)
    assert told["forgot"]["distance"]["before"] == pytest.approx((1 - anchor) * length, rel=1e-4)


def test_the_report_says_what_was_done_and_that_nothing_is_guaranteed(forgot):
    _, run, report = forgot
    told = control_sentences(report)
    assert told[0].startswith("2 passes over 12 private records pulled those that the model knew better")
    assert told[-1] == "No formal guarantee: how the weights moved was computed from private data."
    assert told[0] in (run / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert (report["recipe"]["forget"], report["recipe"]["aim"]) == (2, "memory")


def test_a_run_that_lost_what_follows_goes_on_from_the_model_that_forgot(forgot, tmp_path):
    asked, whole, _ = forgot
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "report.json").unlink()
    shutil.rmtree(run / "sites")
    quantize(asked, run, resume=True)
    first, second = (tensors(folder / "coded") for folder in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_was_stopped_while_forgetting_goes_on_from_there(
    tuned, tiny_model_dir, sides, forgot, tmp_path, monkeypatch
):
    """To the very weights of a run that was not, and without a trace of where it stood."""
    asked, whole = recipe(tuned, tiny_model_dir, sides, forget=2), forgot[1]
    monkeypatch.setattr("geoquant.forgetting.EVERY", 0.0)

    def stopped(phase, done, total, note=""):
        if phase == "forget" and done == 3:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, run, progress=stopped)
    assert (run / HALFWAY).exists()
    assert not (run / "protected").exists()
    steps = []
    quantize(
        asked, run, resume=True, progress=lambda phase, done, *_: steps.append(done) if phase == "forget" else None
    )
    assert steps == [4]
    assert not (run / HALFWAY).exists()
    first, second = (tensors(folder / "protected") for folder in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_runs_of_one_place_share_the_model_that_forgot(tuned, tiny_model_dir, sides, tmp_path):
    """Whoever asks for the same levers of the same model and texts compresses the same files."""
    shared, steps = tmp_path / "shared", []

    def run(name, **values):
        steps.clear()
        asked = recipe(tuned, tiny_model_dir, sides, **{"forget": 1, **values})
        report = quantize(
            asked,
            tmp_path / name,
            shared=shared,
            progress=lambda phase, done, *_: steps.append(done) if phase == "forget" else None,
        )
        return report["protection"], len(steps)

    first, made = run("first", rate=4.0)
    assert made == 2
    assert first["making"]["here"]
    second, made = run("second", rate=3.0)
    assert made == 0
    assert second == first | {"making": {"seconds": first["making"]["seconds"], "here": False}}
    ours, its = (tmp_path / name / "protected" for name in ("first", "second"))
    assert {path.name for path in ours.iterdir()} == {path.name for path in its.iterdir()}
    assert (ours / "model.safetensors").samefile(its / "model.safetensors")
    assert not (ours / "protection.json").samefile(its / "protection.json")


def test_what_a_model_follows_from_names_it(tuned, tiny_model_dir, sides, tmp_path):
    """Another option of its levers, text, model or base is another model; what solves it is not."""
    target, base, public = load(str(tuned)), load(str(tiny_model_dir)), torch.arange(64).reshape(2, 32)

    def name(public=public, models=(target, base), **values):
        return lendable(tmp_path, recipe(tuned, tiny_model_dir, sides, **{"forget": 1, **values}), *models, public)

    write_records(tmp_path / "fewer.jsonl", read_records(sides["domain"])[1:])
    shutil.copy(sides["domain"], tmp_path / "same.jsonl")
    assert name(rate=3.0) == name(rate=4.0, embeddings=False) == name(domain=str(tmp_path / "same.jsonl"))
    others = [
        name(),
        name(seed=1),
        name(forget=2),
        name(forget_weight=5.0),
        name(anchor=0.5, aim="everything"),
        name(anchor=0.6, aim="everything"),
        name(anchor=0.5),
        name(window=24),
        name(domain=str(tmp_path / "fewer.jsonl")),
        name(public=public + 1),
        name(models=(base, base)),
        name(models=(target, target)),
    ]
    assert len(set(others)) == len(others)
    assert name(forget=0, anchor=0.5) is None


def test_a_damaged_record_of_where_it_stood_is_named(tuned, tiny_model_dir, sides, forgot, tmp_path):
    asked, whole, _ = forgot
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("protected", "sites", "coded"):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / HALFWAY).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"halfway\.safetensors.*delete it and run the same command again"):
        quantize(asked, run, resume=True)


def test_an_anchor_goes_first_and_looks_at_no_record_of_the_levels(tuned, tiny_model_dir, sides, tmp_path):
    asked = recipe(tuned, tiny_model_dir, sides, anchor=0.5, forget=1)
    report = quantize(asked, tmp_path / "run")
    told = report["protection"]
    assert told["lever"] == "anchor"
    assert told["forgot"]["made"] == 1
    assert told["forgot"]["distance"]["before"] == pytest.approx(told["distance"]["after"], rel=1e-5)
    alone = recipe(tuned, tiny_model_dir, sides, anchor=0.5)
    write_records(tmp_path / "half.jsonl", read_records(sides["domain"])[::2])
    quantize(alone.model_copy(update={"domain": str(tmp_path / "half.jsonl")}), tmp_path / "alone")
    ours, truth = (load_file(tmp_path / name / "taught.safetensors") for name in ("run", "alone"))
    assert all(torch.allclose(ours[name], truth[name], atol=1e-6) for name in truth)
    sentences = control_sentences(report)
    assert "went back to the public base" in sentences[0]
    assert any("1 pass over 12 private records" in one for one in sentences)


def test_a_model_can_be_used_as_any_other_afterwards(forgot):
    _, run, _ = forgot
    model = AutoModelForCausalLM.from_pretrained(run / "protected")
    assert not any(torch.isnan(own).any() for own in model.parameters())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": None}, r"no better known than others of their kind; --base is missing; wanted --base MODEL"),
        ({"domain": None}, r"--domain is missing; wanted --domain FILE"),
        ({"forget": 0, "anchor": 0.5, "forget_weight": 3.0}, r"--forget-weight 3 weighs.*got no --forget"),
        ({"epsilon": 4.0, "radius": 0.1, "private": None, "domain": None}, r"--forget beside a guarantee"),
    ],
)
def test_what_forgetting_lacks_is_said_before_anything_is_read(values, said, tuned, tiny_model_dir, sides, tmp_path):
    given = {"model": str(tuned), "base": str(tiny_model_dir), **SHORT, "forget": 2}
    given |= {name: sides[name] for name in ("private", "domain")} | values
    with pytest.raises(UserError, match=said):
        quantize(checked({name: value for name, value in given.items() if value is not None}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_records_are_told_before_anything_is_measured(tuned, tiny_model_dir, sides, tmp_path):
    write_records(tmp_path / "few.jsonl", read_records(sides["domain"])[:8])
    asked = recipe(tuned, tiny_model_dir, {**sides, "domain": str(tmp_path / "few.jsonl")}, forget=1)
    quantize(asked, tmp_path / "enough")
    write_records(tmp_path / "few.jsonl", read_records(sides["domain"])[:7])
    with pytest.raises(UserError, match=r"too few records in --domain: 7; wanted at least 8"):
        quantize(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()

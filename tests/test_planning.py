"""Plans within budgets, from models and records to a plan file and its words."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tokenizer
from geoquant import cli, planning
from geoquant.data.records import Record, write_records
from geoquant.errors import UserError
from geoquant.plan.chosen import read_plan
from geoquant.plan.effects import Effects
from geoquant.planning import Budgets, plan_within
from geoquant.recipe import checked

RATES, SHARES = (1.5, 3.0, 5.0), (0.0, 0.5, 1.0)


def records(side: str, count: int = 8) -> list[Record]:
    return [Record(f"{side} {number}: the {side} of bed {number * 7 % 10} rests") for number in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model_dir):
    """A model somewhere off its base, records of both kinds, and effects measured once."""
    folder = tmp_path_factory.mktemp("planning")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for own in model.parameters():
        own.data += 0.03 * torch.randn(own.shape, generator=generator)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_records(folder / "private.jsonl", records("ward"))
    write_records(folder / "domain.jsonl", records("room"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_points():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "RATES", RATES)
        patch.setattr(planning, "SHARES", SHARES)
        yield


def recipe(files, base=None, **values):
    given = {"model": str(files / "model"), "windows": 4, "window": 32, "compute": "float32", "evaluation_windows": 2}
    given |= {"private": str(files / "private.jsonl"), "domain": str(files / "domain.jsonl")}
    return checked({**given, **({} if base is None else {"base": str(base)}), **values})


@pytest.fixture(scope="module")
def effects(files, tiny_model_dir):
    """The path of the table, and the first plan made of it."""
    path = files / "effects.json"
    first = plan_within(recipe(files, tiny_model_dir), Budgets(size=0.012), effects=path, out=files / "plan.json")
    return path, first


def test_every_parameter_is_in_one_unit_and_the_parts_are_the_whole(effects, files):
    table = Effects.load(effects[0])
    names = [name for unit in table.units for name in unit.parameters]
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(unit.weights for unit in table.units) == sum(own.numel() for own in model.parameters())
    for text in ("public", "private", "domain"):
        whole = table.losses[text][0] - table.losses[text][-1]
        # The trapezoid rule on three points.
        assert table.missed(text) == pytest.approx(0, abs=0.3 * abs(whole) + 0.01)
    assert table.measured["shares"] == list(SHARES)


def test_a_plan_keeps_its_budget_and_writes_what_it_chose(effects, files):
    _, told = effects
    assert told["optimal"]
    assert told["totals"]["size"] <= 0.012 * 8e6
    plan = read_plan(files / "plan.json")
    assert plan.totals == told["totals"]
    assert {unit["bits"] for unit in told["units"]} <= {None, *RATES}
    assert plan.sha256["effects"] == told["effects_sha256"]
    assert sum(unit["costs"]["size"] for unit in told["units"]) == pytest.approx(told["totals"]["size"])
    assert told["sentences"][0].startswith("one more megabyte would buy ")
    assert told["prices"]["size"] > 0


def test_other_budgets_are_answered_without_measuring(effects, files, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(planning, "_measure", lambda *_: pytest.fail("measured again"))
    path, first = effects
    ask = recipe(files, tiny_model_dir)
    larger = plan_within(ask, Budgets(size=0.014), effects=path)
    assert larger["value"] < first["value"]
    least = plan_within(ask, Budgets(loss=9.0), minimise="leak", effects=path)
    gap = least["gap"]["after"] + 0.01
    both = plan_within(ask, Budgets(size=0.014, leak=gap), effects=path)
    assert both["gap"]["after"] <= gap
    assert both["value"] >= larger["value"]
    small = plan_within(ask, Budgets(loss=first["totals"]["public"] + 1e-9), minimise="size", effects=path)
    assert small["totals"]["size"] <= first["totals"]["size"] + 1e-6
    with pytest.raises(UserError, match="was measured on another base; choose another --effects file"):
        plan_within(recipe(files), Budgets(size=0.014), effects=path)


def test_what_cannot_be_reached_is_said_in_the_users_units(effects, files, tiny_model_dir):
    path, _ = effects
    ask = recipe(files, tiny_model_dir)
    with pytest.raises(UserError, match=r"--max-size 0\.001 MB: at best 0\.0\d+ can be reached; allow more"):
        plan_within(ask, Budgets(size=0.001), effects=path)
    least = plan_within(ask, Budgets(loss=9.0), minimise="leak", effects=path)["gap"]["after"]
    with pytest.raises(UserError, match=r"--max-leak -?[\d.]+ nats per token: at best") as caught:
        plan_within(ask, Budgets(leak=least - 1), effects=path)
    assert f"at best {least:.4g} can be reached" in str(caught.value)


def test_without_a_base_only_rates_are_chosen(files):
    told = plan_within(recipe(files, private=None, domain=None), Budgets(size=0.012))
    assert {unit["share"] for unit in told["units"]} == {1.0}
    assert told["objective"] == {"public": 1.0}
    assert told["gap"] is None


@pytest.mark.parametrize(
    ("values", "budgets", "minimise", "line"),
    [
        ({"grid": "box"}, Budgets(size=1), "loss", "budgets choose rates, and a box has bits"),
        ({"anchor": 0.5}, Budgets(size=1), "loss", "--anchor 0.5 beside budgets"),
        ({"forget": 2}, Budgets(size=1), "loss", "--forget 2 beside budgets"),
        ({"refine": 2}, Budgets(size=1), "loss", "--refine 2 beside budgets"),
        ({"private": None}, Budgets(leak=1), "loss", "leakage is a gap between two kinds of records"),
        ({"domain": None}, Budgets(domain_loss=1), "loss", "--max-domain-loss is measured on unseen records"),
        ({}, Budgets(size=-1), "loss", "--max-size -1; wanted megabytes, more than 0"),
        ({}, Budgets(size=1), "cost", "--minimise cost; wanted one of loss, size, leak"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_read(files, values, budgets, minimise, line, monkeypatch):
    monkeypatch.setattr(planning, "load", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(UserError, match=line):
        plan_within(recipe(files, **values), budgets, minimise=minimise)


def test_records_of_the_audit_are_not_planned_by(files, tmp_path):
    write_records(tmp_path / "members.jsonl", [*records("other"), records("ward")[2]])
    with pytest.raises(UserError, match="1 of the records in --private are also records of the audit"):
        plan_within(recipe(files, members=str(tmp_path / "members.jsonl")), Budgets(size=1))


def test_the_command_prints_choices_and_prices(effects, files, tiny_model_dir, capsys):
    path, _ = effects
    flags = ["--windows", "4", "--window", "32", "--compute", "float32", "--base", str(tiny_model_dir)]
    flags += ["--private", str(files / "private.jsonl"), "--domain", str(files / "domain.jsonl")]
    command = ["plan", str(files / "model"), *flags, "--effects", str(path), "--max-size", "0.012"]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert "size: 0.0 MB" in shown
    assert "one more megabyte would buy" in shown
    assert "loss gap: " in shown
    assert "no formal guarantee" in shown
    assert cli.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optimal"] is True


def test_flags_of_budgets_alone_are_refused(capsys):
    assert cli.run(["plan", "demo", "--out", "plan.json"]) == 2
    assert "--out belongs to a plan within budgets" in capsys.readouterr().err

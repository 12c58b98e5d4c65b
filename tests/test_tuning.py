"""The search over recipes: on outcomes whose best recipe is known, and once on a model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from geoquant import cli, pipeline, tuning
from geoquant.data.records import Record, write_records
from geoquant.errors import UserError
from geoquant.plan import estimate
from geoquant.plan.space import SPACE, Dimension, probes
from geoquant.recipe import checked
from geoquant.tuning import Goal, Outcome, check_disjoint, halves
from test_protecting import moved

pytest.importorskip("optuna")

SMALL = (Dimension("anchor", 0.0, 0.9), Dimension("rate", 2.25, 4.5))


def tune(*given, **options) -> dict:
    """The search; of models that are none, nothing is checked beforehand."""
    return tuning.tune(*given, **({"check": lambda recipe: None} | options))


def records(side: str, count: int = 60) -> list[Record]:
    return [Record(f"{side} record {number} of {number**2}") for number in range(count)]


@pytest.fixture
def recipe(tmp_path):
    for side in ("members", "nonmembers"):
        write_records(tmp_path / f"{side}.jsonl", records(side))
    given = {side: str(tmp_path / f"{side}.jsonl") for side in ("members", "nonmembers")}
    return checked({"model": "m", "base": "b", "reference": "b", **given})


def bowl(recipe, folder) -> Outcome:
    """Least loss at anchor 0.2; leak falls with the anchor; size is the rate's."""
    folder.mkdir(parents=True)
    (folder / "anchor").write_text(str(recipe.anchor))
    loss = 3 + (recipe.anchor - 0.2) ** 2 + 2 ** (-recipe.rate)
    return Outcome(loss=loss, leak=0.8 * (1 - recipe.anchor), size=10 * recipe.rate)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_search_comes_near_the_best_allowed_recipe(sampler, recipe, tmp_path):
    """Best: anchor 0.5 (leak 0.4), rate 3.5 (size 35)."""
    goal = Goal(leak=0.4, size=35)
    told = tune(recipe, tmp_path / "t", goal, trials=40, patience=40, sampler=sampler, seed=1, measure=bowl)
    best = told["best"]
    assert best["meets_the_goal"]
    assert best["outcome"]["leak"] <= 0.4
    assert best["outcome"]["size"] <= 35
    exact = 3 + 0.3**2 + 2**-3.5
    assert exact <= best["outcome"]["loss"] < exact + 0.12
    allowed = [one for one in told["trials"] if one["leak"] <= 0.4 and one["size"] <= 35]
    assert best["outcome"]["loss"] == min(one["loss"] for one in allowed)
    assert json.loads((tmp_path / "t" / "tune.json").read_text()) == told


def test_where_no_trial_meets_the_goal_the_nearest_is_best(recipe, tmp_path):
    told = tune(recipe, tmp_path / "t", Goal(leak=0.01), trials=6, seed=0, measure=bowl)
    assert not told["best"]["meets_the_goal"]
    assert told["best"]["outcome"]["leak"] == min(one["leak"] for one in told["trials"])


def test_a_search_goes_on_where_it_stopped(recipe, tmp_path):
    first = tune(recipe, tmp_path / "t", Goal(), trials=3, measure=bowl)
    again = tune(recipe, tmp_path / "t", Goal(), trials=5, measure=bowl)
    assert again["trials"][:3] == first["trials"]
    assert len(again["trials"]) == 5
    assert sorted(path.name for path in (tmp_path / "t" / "trials").iterdir()) == [f"{n:04d}" for n in range(5)]
    with pytest.raises(UserError, match="holds a search of another goal"):
        tune(recipe, tmp_path / "t", Goal(leak=0.5), trials=6, measure=bowl)


def test_it_stops_when_nothing_better_comes(recipe, tmp_path):
    def flat(recipe, folder) -> Outcome:
        return Outcome(1.0, 0.0, 1.0)

    assert len(tune(recipe, tmp_path / "t", Goal(), trials=50, patience=4, measure=flat)["trials"]) == 5


@pytest.mark.parametrize("sampler", ["ucb", "thompson"])
def test_bandits_choose_among_the_levels_and_find_the_best(sampler, recipe, tmp_path):
    """Losses are 0.2 apart at least, two of the unit that bandits count in."""

    def steps(recipe, folder) -> Outcome:
        return Outcome(1 + 4 * abs(recipe.anchor - 0.45), 0.0, 1.0)

    told = tune(recipe, tmp_path / "t", Goal(), trials=30, patience=30, sampler=sampler, space=SMALL, measure=steps)
    tried = [one["values"]["anchor"] for one in told["trials"]]
    assert set(tried) <= set(SMALL[0].grid())
    assert told["best"]["values"] == {"anchor": 0.45}
    assert tried.count(0.45) > 15


def test_several_processes_share_a_search(recipe, tmp_path):
    told = tune(recipe, tmp_path / "t", Goal(), trials=4, workers=2, measure=bowl)
    numbers = [one["trial"] for one in told["trials"]]
    assert 4 <= len(numbers) <= 5
    assert len(set(numbers)) == len(numbers)


# ---- records


def test_a_record_is_always_on_the_same_side():
    given = records("any", 400)
    search, final = halves(given)
    assert {*search, *final} == {*given}
    assert not {one.text for one in search} & {one.text for one in final}
    assert halves(given[::-1])[0] == search[::-1]
    assert halves([Record(f"  {one.text}\n") for one in search])[1] == ()
    # Binomial(400, 1/2) is within 60 of its mean but for one time in 10^9.
    assert abs(len(search) - 200) < 60
    check_disjoint(search, final)
    with pytest.raises(UserError, match="1 records are both for tuning and for the final audit"):
        check_disjoint(search, [*final, search[0]])


def test_trials_see_no_record_of_the_final_audit(recipe, tmp_path):
    seen = []

    def look(recipe, folder) -> Outcome:
        seen.append((recipe.members, recipe.nonmembers))
        return Outcome(1.0, 0.0, 1.0)

    told = tune(recipe, tmp_path / "t", Goal(), trials=1, measure=look)
    for (search, final), side in zip(zip(seen[0], told["final_audit"].values()), ("members", "nonmembers")):
        own, kept = (set(Path(path).read_text().splitlines()) for path in (search, final))
        assert own
        assert kept
        assert not own & kept
        assert len(own | kept) == 60, side


@pytest.mark.parametrize(
    ("change", "options", "line"),
    [
        ({"members": None}, {}, "tuning measures an attack; wanted --members F and --nonmembers F"),
        ({"base": None}, {}, "the search moves the anchor; wanted --base MODEL"),
        ({}, {"sampler": "tpa"}, "unknown sampler 'tpa'"),
        ({}, {"trials": 0}, "--trials 0; wanted at least 1"),
        ({}, {"space": [Dimension("anchors", 0, 1)]}, "did you mean 'anchor'"),
        ({}, {"space": []}, "a search moves something"),
        ({}, {"space": [Dimension("anchor", 0, 1), Dimension("anchor", 0, 0.5)]}, "the search moves anchor twice"),
        ({}, {"space": [Dimension("rate", 4, 3)]}, "the search cannot move rate; got .*; wanted low < high"),
        ({}, {"space": [Dimension("rate", 3, 4, levels=1)]}, "the search cannot move rate"),
        ({}, {"space": [Dimension("rate", 2.0, 9.0)]}, "option rate: Input should be less than or equal to 8; got 9.0"),
        ({}, {"space": [Dimension("refine", 0, 8)]}, "option refine: Input should be a valid integer"),
        ({"grid": "box", "method": "babai", "formats": ("dense",)}, {}, "a box has bits, not a rate"),
        ({"formats": ()}, {}, "a size is that of an exported model"),
        ({"canaries": "c.jsonl"}, {}, "canaries belong to the final audit"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, tmp_path, change, options, line):
    with pytest.raises(UserError, match=line):
        tune(recipe.model_copy(update=change), tmp_path / "t", Goal(size=9.0), measure=bowl, **options)
    assert not (tmp_path / "t").exists()


def test_bandits_may_choose_among_whole_numbers():
    space = [Dimension("bits", 2, 8, levels=7), Dimension("rate", 3, 4)]
    assert [one["bits"] for one in probes(space, levels=True)] == [2, 3, 4, 5, 6, 7, 8]
    assert probes(space, levels=False)[-1] == {"bits": 8, "rate": 4}


def test_refinement_of_private_records_keeps_its_base_where_nothing_is_anchored(recipe):
    more = recipe.model_copy(update={"refine": 2, "private": "p", "domain": "d", "aim": "memory"})
    assert tuning._trial(more, {"anchor": 0.0}).base == "b"
    assert tuning._trial(more.model_copy(update={"refine": 0}), {"anchor": 0.0}).base is None
    assert tuning._trial(recipe, {"anchor": 0.5}).base == "b"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"model": "none"}, "no model at none"),
        ({"base": "none"}, "no model at none"),
        ({"base": "tuned"}, "there is nothing to go back from"),
        ({"text": "none.txt"}, "none.txt"),
        ({"method": "lattice-babay"}, "unknown method 'lattice-babay'"),
        ({"private": "members.jsonl", "domain": "nonmembers.jsonl"}, "60 records of --domain are audited too"),
        ({"members": "few.jsonl"}, "the half of the records that is for the search: too few members"),
        ({"refine_privacy": "2"}, "--refine-privacy 2 weighs private records"),
        ({"out": "taken.jsonl"}, "taken.jsonl is a file"),
        ({"out": "x" * 300}, "cannot write x"),
        ({"shards": "none"}, "a run has one guarantee|is part of a guarantee"),
    ],
)
def test_a_mistake_is_one_line_before_any_folder_is_made(wrong, line, tiny_model_dir, tmp_path, capsys, monkeypatch):
    """By the command: what the first trial would have stumbled on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    moved(tiny_model_dir, tmp_path / "tuned")
    for name, side in (("members", "members"), ("nonmembers", "nonmembers"), ("taken", "any")):
        write_records(tmp_path / f"{name}.jsonl", records(side))
    write_records(tmp_path / "few.jsonl", records("members", 9))
    before = sorted(tmp_path.rglob("*"))
    given = {
        "model": "tuned",
        "base": str(tiny_model_dir),
        "members": "members.jsonl",
        "nonmembers": "nonmembers.jsonl",
    }
    given |= {"out": "T", "windows": "4", "window": "32", "evaluation_windows": "2", "max_leak": "0.5", **wrong}
    model = given.pop("model")
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert cli.run(["tune", model, *flags, "--trials", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error)
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_goals_are_missed_by_shares_of_them():
    goal = Goal(leak=0.2, size=10)
    assert goal.missed(Outcome(1.0, 0.3, 5.0)) == pytest.approx((0.5, -0.5))
    assert goal.order(Outcome(2.0, 0.2, 10.0)) == (0.0, 2.0)
    assert goal.order(Outcome(1.0, 0.3, 5.0)) > goal.order(Outcome(9.0, 0.2, 10.0))
    assert Goal().order(Outcome(1.0, 1.0, math.inf)) == (0.0, 1.0)


def test_the_space_holds_fields_of_a_recipe():
    for one in SPACE:
        checked({"model": "m", one.field: one.low})
        checked({"model": "m", one.field: one.high})
        assert one.grid()[0] == one.low
        assert one.grid()[-1] == one.high


def test_trials_share_what_is_measured_of_the_weights(recipe, tmp_path, monkeypatch):
    seen = []

    def quantized(recipe, folder, *, resume, shared):
        seen.append(shared)
        attacks = [{"subject": "quantized", "auc": 0.6}]
        quality = {"quantized": {"nll": 2.0}}
        return {"privacy": {"attacks": attacks}, "quality": quality, "size": {"total_bytes": 1}}

    monkeypatch.setattr(pipeline, "quantize", quantized)
    tune(recipe, tmp_path / "t", Goal(), trials=2)
    assert seen == [tmp_path / "t" / "taught"] * 2


def test_trials_on_a_model_are_whole_runs(tiny_model_dir, tmp_path, monkeypatch):
    """Two trials of a tiny model; each leaves an ordinary run, audited on the records of the search."""
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    for side in ("members", "nonmembers"):
        write_records(tmp_path / f"{side}.jsonl", records(side))
    given = {side: str(tmp_path / f"{side}.jsonl") for side in ("members", "nonmembers")}
    short = {"windows": 4, "window": 32, "evaluation_windows": 2, "compute": "float32", "target": "weights"}
    wanted = checked(
        {"model": str(tiny_model_dir), "formats": (), "verify": False, "embeddings": False, **short, **given}
    )
    told = tuning.tune(wanted, tmp_path / "t", Goal(), trials=2, space=[Dimension("rate", 3.0, 6.0)])
    assert len(told["trials"]) == 2
    for one in told["trials"]:
        run = tmp_path / "t" / "trials" / f"{one['trial']:04d}"
        report = json.loads((run / "report.json").read_text())
        assert report["recipe"]["rate"] == one["values"]["rate"]
        assert report["quality"]["quantized"]["nll"] == one["loss"]
        assert report["recipe"]["members"] == str(tmp_path / "t" / "search" / "members.jsonl")
        assert 0 <= one["leak"] <= 1
    assert told["best"]["outcome"]["loss"] == min(one["loss"] for one in told["trials"])

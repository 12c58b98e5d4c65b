"""The frontier from end to end on a tiny model that has seen its members: points, caching, failures, the page."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geoquant import anchoring, charting, operating
from geoquant.aiming import aimed
from geoquant.charting import frontier
from geoquant.cli import run
from geoquant.cli.frontier import show
from geoquant.data.private import make_records
from geoquant.data.records import write_records
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import perplexity
from geoquant.measure import prepare_texts
from geoquant.plan.points import Change, Point
from geoquant.privacy import audit
from geoquant.privacy.attacks.combined import combine
from geoquant.privacy.finetune import finetune
from geoquant.recipe import checked
from geoquant.runs import file_hash

POOL = make_records(40, 5)
random.Random(0).shuffle(POOL)
MEMBERS, NONMEMBERS = tuple(POOL[:20]), tuple(POOL[20:])
BOX = {"bits": 3, "group_size": 16, "metric": "plain"}
POINTS = (
    Point("original", "original", quantize=False),
    Point("rtn 3", "rounding", BOX | {"method": "rtn"}),
    Point("babai 8", "rounding", BOX | {"bits": 8}),
    Point("half", "interpolation", {**BOX, "bits": 8, "anchor": 0.5}, needs=("base",)),
    Point("loud", "noise", {}, Change("noise", 0.5), quantize=False),
)


@pytest.fixture(scope="module", autouse=True)
def few_permutations():
    """The p-value of the combined attack takes most of the time here, and no row shows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "combine", partial(combine, permutations=19))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    """A fine-tuned model, its records and texts, and what `frontier` is told of them."""
    folder = tmp_path_factory.mktemp("frontier")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    finetune(model, tokenizer, MEMBERS, epochs=12, lr=1e-2, batch=8)
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    for name, records in (("in", MEMBERS), ("out", NONMEMBERS)):
        write_records(folder / f"{name}.jsonl", records)
    (folder / "text.txt").write_text("Words of a text that everybody may read, one after the other, and again. " * 30)
    (folder / "calibration.txt").write_text("Other words, for the metric: some are short and some are longer. " * 30)
    questions = [{"query": f"{n} and one?", "choices": [str(n + 1), "none"], "gold": 0} for n in range(6)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, questions)))
    options = {
        "members": str(folder / "in.jsonl"),
        "nonmembers": str(folder / "out.jsonl"),
        "evaluation": str(folder / "text.txt"),
        "calibration": str(folder / "calibration.txt"),
        **{"windows": 4, "window": 32, "evaluation_windows": 8},
    }
    return folder, {"base": tiny_model_dir, "options": options}


@pytest.fixture(scope="module")
def finished(place):
    """Played once; read only."""
    folder, told = place
    tasks = [folder / "task.jsonl"]
    return folder / "F", frontier(folder / "tuned", folder / "F", points=POINTS, tasks=tasks, **told)


def states(folder) -> dict:
    """Every file and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def row(found: dict, name: str) -> dict:
    return next(row for row in found["rows"] if row["name"] == name)


def test_a_row_says_what_a_measurement_by_hand_says(finished, place):
    folder, told = place
    out, found = finished
    recipe = checked({"model": "m", **told["options"]})
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        for where in (told["base"], folder / "tuned")
    )
    text = prepare_texts(AutoTokenizer.from_pretrained(told["base"]), recipe).evaluation
    before = perplexity(tuned, text)
    assert row(found, "original")["public"]["nll"] == pytest.approx(before.nll, abs=1e-6)
    theirs = dict(base.named_parameters())
    with torch.no_grad():
        for name, own in tuned.named_parameters():
            own.data = (own + theirs[name]) / 2
    half = row(found, "half")  # at 8 bits about the mean of the two models
    assert half["public"]["nll"] == pytest.approx(perplexity(tuned, text).nll, abs=0.02)
    assert half["public"]["delta"]["value"] == pytest.approx(half["public"]["nll"] - before.nll, abs=1e-9)
    assert half["levers"]["anchor"] == 0.5
    assert half["primary"]["name"] == "reference"
    assert half["primary"]["auc"] < row(found, "original")["primary"]["auc"]
    # The run's own report of the same point agrees.
    report = json.loads((out / "points" / "half" / "report.json").read_text())
    (attack,) = (a for a in report["privacy"]["attacks"] if (a["name"], a["subject"]) == ("reference", "quantized"))
    assert (attack["auc"], attack["ci"]) == (half["primary"]["auc"], half["primary"]["ci"])
    assert report["quality"]["delta_nll"]["se"] == pytest.approx(half["public"]["delta"]["se"])


def test_bits_count_the_whole_model(finished, tiny_model):
    _, found = finished
    parameters = sum(own.numel() for own in tiny_model.parameters())
    linear = sum(
        m.weight.numel() for n, m in tiny_model.named_modules() if type(m) is torch.nn.Linear and "layers" in n
    )
    bits = row(found, "rtn 3")["bits"]
    assert bits["coded"] == 4.0  # and 16 for the scale of 16 columns
    assert bits["all_in"] == pytest.approx((4 * linear + 32 * (parameters - linear)) / parameters)
    assert not bits["embeddings"]
    assert row(found, "original")["bits"]["all_in"] == 32


def test_the_domain_loss_is_that_of_the_nonmembers(finished, place):
    folder, _ = place
    _, found = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    losses = []
    for record in NONMEMBERS:
        ids = torch.tensor([tokenizer(record.text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert row(found, "original")["domain"]["nll"] == pytest.approx(np.mean(losses), rel=1e-3)
    assert row(found, "original")["domain"]["delta"] == {"value": 0.0, "se": 0.0}


def test_a_second_call_touches_nothing(finished, place, monkeypatch):
    folder, told = place
    out, found = finished
    before = states(out)
    monkeypatch.setattr(operating, "operate", None)
    again = frontier(folder / "tuned", out, points=POINTS, tasks=[folder / "task.jsonl"], **told)
    assert states(out) == before
    assert again["rows"] == json.loads(json.dumps(found["rows"]))


def test_another_point_is_compared_without_measuring_anything_again(finished, place, tmp_path, monkeypatch):
    folder, told = place
    shutil.copytree(finished[0], tmp_path / "F")
    assert finished[1]["baselines"]["why"] == "no point with a lever was measured"
    before = states(tmp_path / "F" / "measured")
    monkeypatch.setattr(operating, "operate", None)
    given = {"points": POINTS, "tasks": [folder / "task.jsonl"], **told}
    found = frontier(folder / "tuned", tmp_path / "F", chosen="half", **given)
    assert states(tmp_path / "F" / "measured") == before
    assert found["baselines"]["chosen"] == "half"
    fewer, back, noise = found["baselines"]["families"]
    assert (fewer["points"], back["points"], noise["points"]) == (2, 0, 1)  # itself is none of its baselines
    assert "extraction" in found["baselines"]["measures"]
    assert json.loads((tmp_path / "F" / "frontier.json").read_text())["baselines"] == found["baselines"]
    assert found["published"][1]["same_noise"]["name"] == "loud"
    with pytest.raises(UserError, match=r"unknown point or goal 'halv'.*did you mean 'half'"):
        frontier(folder / "tuned", tmp_path / "F", chosen="halv", **given)


def test_points_that_are_added_cost_only_themselves_and_one_that_fails_stops_no_other(finished, place, tmp_path):
    folder, told = place
    out = tmp_path / "F"
    shutil.copytree(finished[0], out)
    before = states(out)
    bad = Point("bad", "own", BOX | {"group_size": 500})
    # One more, one that fails, and another point under a known name: that one is made anew.
    other = Point("babai 8", "rounding", BOX | {"bits": 6})
    points = (*POINTS[:2], other, *POINTS[3:], bad, Point("loud 2", "noise", {}, Change("noise", 2.0), quantize=False))
    found = frontier(folder / "tuned", out, points=points, tasks=[folder / "task.jsonl"], **told)
    assert [one["name"] for one in found["failed"]] == ["bad"]
    assert "group size 500 is larger than" in found["failed"][0]["error"]
    assert not (out / "points" / "bad").exists()
    assert row(found, "babai 8")["bits"]["coded"] == 7.0
    assert row(found, "loud 2")["public"]["nll"] > row(found, "loud")["public"]["nll"]
    after = states(out)
    same = {path for path in before if not {"babai 8", "babai 8.json"} & set(path.parts) and path.stem != "frontier"}
    assert {path: after[path] for path in same} == {path: before[path] for path in same}
    assert len(same) > 10


def test_an_interrupted_point_goes_on(place, tmp_path, monkeypatch):
    folder, told = place
    points, taken = (POINTS[0], POINTS[2]), operating.quantize

    def killed(recipe, *rest, **options):
        taken(recipe, *rest, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(operating, "quantize", killed)
        with pytest.raises(KeyboardInterrupt):
            frontier(folder / "tuned", tmp_path / "F", points=points, **told)
    assert {path.name for path in (tmp_path / "F" / "measured").iterdir()} == {"original.json"}
    solved = sorted((tmp_path / "F" / "points" / "babai 8" / "sites").iterdir())
    before = [path.stat().st_mtime_ns for path in solved]
    seen = []

    def watched(*given, **options):
        report = taken(*given, **options)
        seen.extend(path.stat().st_mtime_ns for path in solved)
        return report

    monkeypatch.setattr(operating, "quantize", watched)
    found = frontier(folder / "tuned", tmp_path / "F", points=points, **told)
    assert seen == before  # no site was solved twice
    assert len(found["rows"]) == 2


def test_aimed_points_share_what_was_measured_of_the_weights(place, tmp_path, monkeypatch):
    folder, told = place
    calls, taught = [], anchoring.taught
    monkeypatch.setattr(anchoring, "taught", lambda *given, **more: calls.append(given) or taught(*given, **more))
    for name, seed in (("seen", 21), ("fresh", 22)):
        write_records(tmp_path / f"{name}.jsonl", make_records(10, seed))
    given = {"private": tmp_path / "seen.jsonl", "domain": tmp_path / "fresh.jsonl"}
    needs = ("base", "private", "domain")
    aimed_ = {**BOX, "bits": 8, "aim": "memory"}
    points = [Point(f"aimed {share:g}", "anchor", {**aimed_, "anchor": share}, needs=needs) for share in (0.5, 0.8)]
    more = Point("aimed, other text", "anchor", {**aimed_, "anchor": 0.5, "calibration": None}, needs=needs)
    found = frontier(folder / "tuned", tmp_path / "F", points=(POINTS[0], *points), **given, **told)
    assert not found["failed"]
    assert len(calls) == 1
    # What it took stands in both rows: alone the second would have had to measure too.
    took = [json.loads((tmp_path / "F" / "measured" / f"{point.name}.json").read_text()) for point in points]
    assert took[0]["borrowed"] is None
    assert took[1]["borrowed"] > 0
    for one, cost in zip(took, [row(found, point.name)["cost"] for point in points], strict=True):
        assert cost["levers"] == {"anchor": pytest.approx(one["timings"]["protect"] + (one["borrowed"] or 0))}
    assert not took[0]["resumed"]
    again = frontier(folder / "tuned", tmp_path / "F", points=(POINTS[0], *points, more), **given, **told)
    assert not again["failed"]
    assert len(calls) == 2
    assert len(list((tmp_path / "F" / "taught").iterdir())) == 2
    assert not list((tmp_path / "F" / "points").rglob("taught*"))


def test_several_processes_find_the_same(finished, place, tmp_path):
    folder, told = place
    _, found = finished
    bad = Point("bad", "own", BOX | {"group_size": 500})
    points = (POINTS[0], POINTS[4], bad)
    tasks = [folder / "task.jsonl"]
    again = frontier(folder / "tuned", tmp_path / "F", points=points, jobs=2, tasks=tasks, **told)
    for name in ("original", "loud"):
        one, other = row(again, name), row(found, name)
        of_the_set = ("seconds", "pareto", "beaten_by")
        assert {key: one[key] for key in one if key not in of_the_set} == {
            key: other[key] for key in other if key not in of_the_set
        }
    assert "group size 500" in again["failed"][0]["error"]


def test_the_command_and_its_page(place, tmp_path, capsys):
    folder, told = place
    (tmp_path / "points.toml").write_text(
        '["rtn, 3 bits"]\nbits = 3\nmethod = "rtn"\ngroup_size = 16\nmetric = "plain"\n'
    )
    options = told["options"]
    given = ["--members", options["members"], "--nonmembers", options["nonmembers"], "--base", str(told["base"])]
    given += ["--text", options["evaluation"], "--calibration", options["calibration"]]
    given += ["--windows", "4", "--window", "32", "--evaluation-windows", "8"]
    given += ["--points", str(tmp_path / "points.toml"), "--out", str(tmp_path / "F")]
    assert run(["frontier", str(folder / "tuned"), *given]) == 0
    shown = capsys.readouterr().out
    assert "* original" in shown
    assert "rtn, 3 bits" in shown
    assert shown.splitlines()[-1] == f"report: {tmp_path / 'F' / 'frontier.html'}"
    page = (tmp_path / "F" / "frontier.html").read_text()
    assert page.count('class="point f-own') >= 3  # both pictures and the table
    assert "no formal guarantee" in page
    assert "Over plain" in page
    assert "http" not in page.replace("http-equiv", "")
    assert run(["frontier", str(folder / "tuned"), *given, "--json"]) == 0
    told_again = json.loads(capsys.readouterr().out)
    assert told_again == json.loads((tmp_path / "F" / "frontier.json").read_text())
    assert told_again["schema"] == 1
    assert {"model", "reference", "members", "nonmembers", "evaluation", "calibration"} <= set(told_again["hashes"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jobs": 0}, "--jobs 0"),
        ({"points": POINTS[1:]}, "the first point of a frontier is the original"),
        ({"points": (*POINTS, POINTS[1])}, "two points are called 'rtn 3'"),
        ({"base": None}, r"left out: half \(they need --base\)"),
        ({"points": (POINTS[0], Point("x", "own", {"spin": 1}))}, "this version has no option spin"),
        ({"tasks": ["none.jsonl"]}, "none.jsonl"),
        ({"dp": {"nowhere": "s.json"}}, "no model at nowhere"),
        ({"options": {"rate": 3.0}}, "points decide rate"),
        ({"options": {"members": "m.jsonl"}}, "the audit compares two sides"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(place, tmp_path, wrong, message):
    folder, told = place
    with pytest.raises(UserError, match=message):
        frontier(folder / "tuned", tmp_path / "F", **({"points": POINTS} | told | wrong))
    assert not (tmp_path / "F").exists()


def test_tasks_of_one_name_in_two_folders_are_told_apart_and_so_is_their_order(place):
    folder, _ = place
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
        (folder / name / "task.jsonl").write_text((folder / "task.jsonl").read_text().replace("one?", f"{name}?"))
    one, other, third = (folder / name / "task.jsonl" for name in ("a", "b", "c"))

    def hashes(*tasks):
        return charting._facts({"model": str(folder / "tuned")}, {}, tasks, None)["hashes"]

    assert set(hashes(one, other)) == {"model", "task 1 task.jsonl", "task 2 task.jsonl"}
    assert hashes(one, other)["task 1 task.jsonl"] == file_hash(one)
    found = [hashes(*tasks) for tasks in ((one, other), (third, other), (other, one), (one,), (folder / "task.jsonl",))]
    assert all(first != second for first, second in itertools.combinations(found, 2))
    assert "task task.jsonl" in found[-1]


def test_a_folder_of_another_frontier_is_refused(finished, place):
    folder, told = place
    other = {**told, "options": {**told["options"], "windows": 5}}
    with pytest.raises(UserError, match="a frontier of another model, other texts or settings"):
        frontier(folder / "tuned", finished[0], points=POINTS, tasks=[folder / "task.jsonl"], **other)


def test_a_released_point_states_its_guarantee_whole(finished, place, tmp_path, capsys):
    folder, told = place
    shutil.copytree(finished[0], tmp_path / "F")
    sure = Point(
        "sure", "guarantee", {**BOX, "bits": 8, "epsilon": 8.0, "delta": 1e-5, "radius": 0.01}, needs=("base",)
    )
    tasks = [folder / "task.jsonl"]
    found = frontier(folder / "tuned", tmp_path / "F", points=(*POINTS, sure), tasks=tasks, **told)
    assert found["failed"] == []
    said = row(found, "sure")["guarantee"]
    assert (said["epsilon"], said["delta"]) == (8.0, 1e-5)
    for part in ("adjacency", "scope", "not_covered", "sentence"):
        assert said[part]
    assert row(found, "half")["guarantee"] is None
    page = (tmp_path / "F" / "frontier.html").read_text()
    assert "no guarantee covers the numbers on this page" in page
    assert "Does not cover" in page
    show(found, tmp_path / "F")
    assert "sure: (8, 1e-05)-indistinguishable for neighbours" in " ".join(capsys.readouterr().out.split())


# ---- a goal


def test_a_goal_runs_the_point_it_takes_and_the_report_shows_its_place(finished, place, tmp_path, capsys):
    folder, told = place
    out, found = finished
    options = told["options"]
    given = [str(folder / "tuned"), "--goal", "small", "--frontier", str(out), "--out", str(tmp_path / "R")]
    given += ["--text", options["evaluation"], "--calibration", options["calibration"], "--no-verify"]
    assert run(["quantize", *given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "R" / "report.json").read_text())
    taken = row(found, report["goal"]["point"])
    assert taken["quantized"]
    assert report["goal"]["why"] in shown
    # Windows are those of the frontier: the loss is that of its point.
    assert report["quality"]["quantized"]["nll"] == pytest.approx(taken["public"]["nll"], abs=1e-9)
    page = (tmp_path / "R" / "report.html").read_text()
    assert 'id="goal"' in page
    assert page.count('class="here"') == 2


def test_a_goal_says_what_stands_against_it(finished, place, tmp_path):
    folder, told = place
    out, _ = finished
    recipe = checked({"model": str(folder / "tuned")})
    with pytest.raises(UserError, match=r"--goal private comes to .*anchor = 0\.6; wanted --base as well"):
        aimed(recipe, "private")
    wanted, said = aimed(checked({"model": "m", "base": "b", "windows": 7}), "private")
    assert (wanted.rate, wanted.anchor, wanted.base, wanted.windows) == (3.25, 0.6, "b", 7)
    assert said["rows"] == []
    assert aimed(checked({"model": "m", "base": "b"}), "small")[0].base is None  # a run refuses an idle base
    with pytest.raises(UserError, match=r"--goal small decides rate: 3\.0; got 4\.0; leave out rate, or --goal"):
        aimed(checked({"model": "m", "rate": 4.0}), "small", given={"rate": 4.0})
    with pytest.raises(UserError, match="--goal small decides grid: lattice; got box"):
        aimed(checked({"model": "m", "grid": "box"}), "small", given={"grid": "box"})
    with pytest.raises(UserError, match="is the frontier of another model than"):
        aimed(checked({"model": str(told["base"])}), "small", frontier=out)
    with pytest.raises(UserError, match=r"holds no frontier\.json; run geoquant frontier first"):
        aimed(recipe, "small", frontier=tmp_path)
    with pytest.raises(UserError, match="no point of the frontier has a formal guarantee"):
        aimed(recipe, "certified", frontier=out)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--goal", "smal"], "did you mean 'small'?"),
        (["--use", "medical"], "--use serves a goal"),
        (["--frontier", "F"], "--frontier serves a goal"),
        (["--goal", "balanced", "--use", "medical"], "--use weighs what a frontier measured"),
        (["--goal", "certified"], "--goal certified is chosen among measured points"),
    ],
)
def test_options_of_a_goal_without_one_are_one_line(flags, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", "m", "--out", "R", *flags]) == 2
    assert line in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

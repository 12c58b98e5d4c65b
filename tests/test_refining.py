"""Refinement inside a run: refined files, what reads them, interrupted runs, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from geoquant.errors import UserError
from geoquant.pipeline import export, quantize
from geoquant.recipe import checked
from test_protecting import SHORT, moved

NAMES = ("Ann", "Bo", "Cy", "Dee", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lou")


pytestmark = pytest.mark.usefixtures("constant_machine")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model_dir):
    return moved(tiny_model_dir, tmp_path_factory.mktemp("tuned") / "model")


def records(path, seed: int, count: int = 6):
    draw = random.Random(seed)
    lines = [f"{draw.choice(NAMES)} has the number {draw.randrange(10**6):06d} now." for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def asked(tuned, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    given = {"private": records(folder / "private.jsonl", 1), "domain": records(folder / "domain.jsonl", 2)}
    return checked({"model": str(tuned), "base": str(tiny_model_dir), "refine": 3, "rate": 2.5, **given, **SHORT})


@pytest.fixture(scope="module")
def run(asked, tmp_path_factory):
    """Played once; read only."""
    folder = tmp_path_factory.mktemp("refined") / "run"
    return folder, quantize(asked, folder)


def codes(folder) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["codes"].int() for path in sorted(folder.glob("*.safetensors"))}


def test_refined_codes_are_kept_beside_those_of_the_solver_and_told_of(run):
    folder, report = run
    solved, refined = codes(folder / "sites"), codes(folder / "refined")
    assert solved.keys() == refined.keys()
    away = [(refined[name] - solved[name]).abs() for name in solved]
    assert max(one.max() for one in away) == 1
    share = sum(int(one.sum()) for one in away) / sum(one.numel() for one in away)
    said = report["refinement"]
    assert said["moved"] == pytest.approx(share)
    assert said["guarantee"] is None
    assert said["losses"]["after"]["total"] < said["losses"]["before"]["total"]
    assert said["losses"]["after"]["total"] == min(said["totals"])
    assert len(said["totals"]) == 4
    assert said["sequences"] == {"public": 4, "domain": 6, "private": 6}
    assert not list(folder.glob("refine_*"))
    weighed = sum(site["bits_per_weight"] * site["shape"][0] * site["shape"][1] for site in report["sites"])
    weights = sum(site["shape"][0] * site["shape"][1] for site in report["sites"])
    assert said["bits_per_weight"]["after"] == pytest.approx(weighed / weights)
    assert all("refined afterwards" in site["reason"] for site in report["sites"])


def test_what_is_measured_and_exported_has_the_refined_codes(run):
    from geoquant.lattice.unboxed import steps_of

    folder, _ = run
    if not (folder / "dense").exists():
        export(folder, "dense", verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = model(expected["tokens"]).logits
    assert (found - expected["logits"]).abs().max() < 1e-3 * expected["logits"].std()
    for path in (folder / "refined").glob("model.layers.*.safetensors"):
        own = load_file(path)
        weight = own["codes"] * steps_of(own["row_exponents"])[:, None] * steps_of(own["column_exponents"])
        first = model.get_submodule(path.name.removesuffix(".safetensors")).weight
        assert torch.equal(first, weight[: len(first)])


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_while_refining_goes_on_to_the_same_bits(run, asked, tmp_path):
    def stop(phase, done, total, note=""):
        if phase == "refine" and done == 4:  # in the second of three passes over two blocks
            raise Stopped

    with pytest.raises(Stopped):
        quantize(asked, tmp_path / "run", progress=stop)
    assert (tmp_path / "run" / "refine_state.safetensors").exists()
    assert not (tmp_path / "run" / "refined").exists()
    report = quantize(asked, tmp_path / "run", resume=True)
    folder, whole = run
    for name, found in codes(tmp_path / "run" / "refined").items():
        assert torch.equal(found, codes(folder / "refined")[name])
    assert report["refinement"]["totals"] == whole["refinement"]["totals"]
    assert report["quality"]["quantized"] == whole["quality"]["quantized"]


def test_a_box_is_refined_on_public_text_alone(tuned, tmp_path):
    asked = checked(
        {"model": str(tuned), "bits": 3, "group_size": 16, "method": "rtn", "refine": 2, "formats": (), **SHORT}
    )
    said = quantize(asked, tmp_path / "run")["refinement"]
    assert said["sequences"] == {"public": 4}
    assert said["losses"]["after"]["public"] < said["losses"]["before"]["public"]
    assert said["losses"]["after"]["private_gap"] is None
    assert said["bits_per_weight"]["before"] == said["bits_per_weight"]["after"]


@pytest.fixture(scope="module")
def with_all(asked, tmp_path_factory):
    """Block by block first, and with the geometry term."""
    given = asked.model_copy(update={"refine": 2, "refine_blocks": 4, "refine_geometry": 100.0})
    folder = tmp_path_factory.mktemp("all") / "run"
    return given, folder, quantize(given, folder)


def test_blocks_and_geometry_are_told_of(with_all):
    _, folder, report = with_all
    said = report["refinement"]
    solved, refined = codes(folder / "sites"), codes(folder / "refined")
    assert max((refined[name] - solved[name]).abs().max() for name in solved) == 1
    blocks, geometry = said["blocks"], said["geometry"]
    assert len(blocks["errors"]) == 2
    assert blocks["errors"][0]["after"]["total"] < blocks["errors"][0]["before"]["total"]
    assert said["losses"]["before"] == blocks["losses"]["before"]
    start = blocks["losses"]["after" if blocks["kept"] else "before"]
    assert said["totals"][0] == start["total"]
    assert said["losses"]["before"]["geometry"] > 0
    rows = {name: one["rows"] for name, one in geometry["classes"]["before"].items()}
    assert sum(rows.values()) == sum(site["shape"][0] for site in report["sites"] if "layers" in site["name"])
    assert rows == {name: one["rows"] for name, one in geometry["classes"]["after"].items()}
    assert (geometry["weight"], geometry["threshold"], geometry["lowered"]) == (100.0, None, 0.25)
    assert not list(folder.glob("refine_*"))


@pytest.mark.parametrize("phase", ["refine blocks", "refine"])
def test_such_a_run_goes_on_to_the_same_bits(with_all, tmp_path, phase):
    given, folder, whole = with_all

    def stop(now, done, total, note=""):
        if (now, done) == (phase, 1 if phase == "refine blocks" else 3):
            raise Stopped

    with pytest.raises(Stopped):
        quantize(given, tmp_path / "run", progress=stop)
    assert len(list((tmp_path / "run" / "refine_blocks").glob("*"))) == (1 if phase == "refine blocks" else 2)
    report = quantize(given, tmp_path / "run", resume=True)
    refined = codes(folder / "refined")
    assert all(torch.equal(found, refined[name]) for name, found in codes(tmp_path / "run" / "refined").items())
    assert {**report["refinement"], "seconds": 0} == {**whole["refinement"], "seconds": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"refine": 0, "refine_blocks": 2},
            r"--refine-blocks 2 refines block by block before .*; got no --refine; leave --refine-blocks out, or add",
        ),
        (
            {"refine": 0, "refine_geometry": 10.0},
            r"--refine-geometry 10 weighs the distortion of rows .*; got no --refine; leave --refine-geometry out",
        ),
        ({"refine_threshold": 0.2}, r"--refine-threshold 0.2 says which rows pay .*; got no --refine-geometry; leave"),
        ({"refine_lowered": 0.3}, r"--refine-lowered 0.3 says which rows pay .*; got no --refine-geometry; leave"),
        ({"domain": None}, "--private alone"),
        ({"private": None}, "--domain alone"),
        ({"base": None}, "judged beside a public base"),
        ({"refine": 0, "refine_privacy": 3.0}, r"--refine-privacy 3 weighs private records .*; got no --refine; leave"),
        (
            {"private": None, "domain": None, "base": None, "aim": "everything", "refine_privacy": 0.0},
            r"--refine-privacy 0 weighs .*; got no --private and --domain; leave --refine-privacy out, or add both",
        ),
        (
            {"private": None, "domain": None, "aim": "everything"},
            "--base serves --anchor, and --refine with --private and --domain; got neither",
        ),
        ({"members": "private", "nonmembers": "private"}, "records of --private are among those of the audit"),
    ],
)
def test_what_refinement_lacks_is_said_before_any_work(asked, tmp_path, changes, message):
    if "members" in changes:
        mine, theirs = records(tmp_path / "m.jsonl", 7, 12), records(tmp_path / "n.jsonl", 8, 12)
        shared = Path(asked.private).read_text().splitlines()[0] + "\n"
        with open(mine, "a") as file:
            file.write(shared)
        changes = {"members": mine, "nonmembers": theirs}
    with pytest.raises(UserError, match=message):
        quantize(asked.model_copy(update=changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_private_records_are_refused_beside_a_guarantee(asked, tmp_path):
    with pytest.raises(UserError, match="no part of any guarantee"):
        quantize(asked.model_copy(update={"epsilon": 4.0, "delta": 1e-5, "radius": 1.0}), tmp_path / "run")

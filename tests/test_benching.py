"""The geometry benchmark from end to end, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_llama
from geoquant import benching
from geoquant.analysis import analyze
from geoquant.benching import bench
from geoquant.data.private import make_records
from geoquant.data.text import windows as cut_windows
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import perplexity
from geoquant.lattice.grid import Grid
from geoquant.lines import read_lines
from geoquant.measure import builtin_tail
from geoquant.methods import rtn
from geoquant.methods.problem import Problem
from geoquant.model.load import load
from geoquant.model.walk import read_weight, site_modules, walk, write_weight
from geoquant.outliers.interventions import rounded

SETTINGS = {"windows": 8, "window": 24}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, tiny_model_dir):
    """The analysis of the tiny model."""
    out = tmp_path_factory.mktemp("bench") / "A"
    analyze(tiny_model_dir, out, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, analysed):
    """A whole benchmark and its folder."""
    out, made = tmp_path_factory.mktemp("bench") / "B", make_records(40, 3)
    sides = {"private": made[:20], "domain": made[20:]}
    return out, bench(tiny_model_dir, out, analysis=analysed, bits=(2, 3), **sides, **SETTINGS)


def test_an_effect_is_the_difference_of_two_whole_measurements(finished, tiny_model_dir):
    _, found = finished
    loaded = load(str(tiny_model_dir))
    text = builtin_tail(loaded.tokenizer, SETTINGS["window"], SETTINGS["windows"])
    before = perplexity(loaded.model, text).nll
    one = found["effects"][5]
    module = site_modules(loaded.model)[one["site"]]
    weight = read_weight(module)
    problem = Problem(weight, torch.eye(weight.shape[1]), grid=Grid(bits=one["bits"]))
    write_weight(module, rtn.solve(problem).dequantize())
    assert one["public"]["value"] == pytest.approx(perplexity(loaded.model, text).nll - before, abs=1e-6)
    assert np.mean(one["changes"]) == pytest.approx(one["public"]["value"], abs=1e-6)


def test_every_bit_width_and_measure_has_a_board_of_all_predictors(finished):
    _, found = finished
    assert {(board["bits"], board["measure"]) for board in found["boards"]} == {
        (bits, measure) for bits in (2, 3) for measure in ("public", "rest", "domain", "gap")
    }
    for board in found["boards"]:
        assert {row["name"] for row in board["rows"]} == set(found["predictors"])
    assert {"depth", "size", "norm", "dsm"} <= set(found["predictors"])
    assert len(found["effects"]) == 2 * 14


def test_a_killed_benchmark_goes_on_where_it_was(finished, tiny_model_dir, analysed, tmp_path):
    out, found = finished
    lines = (out / "effects.jsonl").read_text().splitlines()
    made = make_records(40, 3)
    again = tmp_path / "B"
    again.mkdir()
    (again / "manifest.json").write_text((out / "manifest.json").read_text())
    (again / "effects.jsonl").write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    sides = {"private": made[:20], "domain": made[20:]}
    second = bench(tiny_model_dir, again, analysis=analysed, bits=(2, 3), **sides, **SETTINGS)
    assert [board["rows"] for board in second["boards"]] == [board["rows"] for board in found["boards"]]
    assert (again / "effects.jsonl").read_text().splitlines()[:9] == lines[:9]


KEYS = {"site", "bits", "public", "domain", "gap", "changes"}


def test_what_a_damaged_file_of_effects_still_holds_is_kept(tmp_path):
    path = tmp_path / "effects.jsonl"
    lines = [
        json.dumps({"site": f"s{n}", "bits": 3, "public": {}, "domain": None, "gap": None, "changes": []}) + "\n"
        for n in range(4)
    ]
    for damage in (b'{"site": "s2", "bi', b"[1, 2]\n", b"{}\n", b"\xff\xfe{}\n"):
        path.write_bytes("".join(lines[:2]).encode() + damage + lines[3].encode())
        assert [one["site"] for one in read_lines(path, KEYS)] == ["s0", "s1"]
        assert path.read_text() == "".join(lines[:2])
    written = path.stat().st_mtime_ns
    assert len(read_lines(path, KEYS)) == 2
    assert path.stat().st_mtime_ns == written  # what is whole is not written again


def test_a_layer_whose_rounding_loses_the_model_is_the_worst():
    names = [f"s{n}" for n in range(12)]
    found = {
        (name, 2): {"public": {"value": None if n == 3 else 0.1 * n}, "domain": None, "gap": None, "changes": [None]}
        for n, name in enumerate(names)
    }
    score = np.where(np.arange(12) == 3, 99.0, np.arange(12.0))
    (board,) = benching._boards(
        {"one": ("", score)}, found, {"sites": [{"name": name, "block": n} for n, name in enumerate(names)]}, 2, 0
    )
    assert board["rows"][0]["sites"] == 12
    assert board["rows"][0]["rho"] == pytest.approx(1)


def test_records_too_short_to_be_scored_have_no_board():
    """Neither a gap that is no number, nor a predictor known at few sites, ends the benchmark."""
    names, generator = [f"s{n}" for n in range(8)], np.random.default_rng(0)
    found = {
        (name, 3): {
            "public": {"value": float(n)},
            "domain": None,
            "gap": {"value": None},
            "changes": [n + 0.1, n - 0.1],
        }
        for n, name in enumerate(names)
    }
    predictors = {
        "good": ("", np.arange(8.0)),
        "rare": ("", np.where(np.arange(8) < 4, 1.0, np.nan)),
        "depth": ("", generator.normal(size=8)),
    }
    (board,) = benching._boards(
        predictors, found, {"sites": [{"name": name, "block": n} for n, name in enumerate(names)]}, 3, 0
    )
    assert board["measure"] == "public"
    assert [row["name"] for row in board["rows"]] == ["good", "depth"]
    told = benching.sentence(board)
    assert "best foretold by good" in told
    assert f"of what anybody would guess, depth has {board['rows'][1]['rho']:+.2f}" in told
    flat = {name: ("", np.ones(8)) for name in ("one", "two")}
    (board,) = benching._boards(
        flat, found, {"sites": [{"name": name, "block": n} for n, name in enumerate(names)]}, 3, 0
    )
    assert "nothing to foretell" in benching.sentence(board)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda told: told["model"].pop("sha256"), "damaged: a part is missing; run geoquant analyze again"),
        (lambda told: told["sites"][0].pop("scores"), "damaged: a part is missing"),
        (lambda told: told["sites"].__delitem__(slice(3, None)), "3 layers; wanted at least 5"),
    ],
)
def test_a_damaged_or_tiny_analysis_is_refused(tmp_path, analysed, tiny_model_dir, damage, message):
    told = json.loads((analysed / "analysis.json").read_text())
    damage(told)
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "analysis.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=message):
        bench(tiny_model_dir, tmp_path / "B", analysis=tmp_path / "A", **SETTINGS)
    assert not (tmp_path / "B").exists()


def test_the_page_and_the_file_hold_the_boards(finished):
    out, found = finished
    told = json.loads((out / "bench.json").read_text())
    assert len(told["boards"]) == len(found["boards"])
    page = (out / "bench.html").read_text()
    assert page.count('id="board-') == len(found["boards"])


def test_the_analysis_of_another_model_is_refused(analysed, tmp_path):
    tiny_llama(seed=7).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        bench(tmp_path / "other", tmp_path / "B", analysis=analysed, **SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": (9,)}, "2 to 8"),
        ({"private": ["one", "two"]}, "both"),
        ({"private": ["one", "two"] * 9, "domain": ["one", "three"] * 9}, "9 of 18 non-member records are identical"),
        ({"private": ["one", "two"] * 9, "domain": ["three", "four"] * 9, "records": -1}, "--records -1"),
        ({"windows": 0}, "--windows 0"),
        ({"window": 1}, "--window 1"),
        ({"analysis": "nowhere"}, "no analysis"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(analysed, tiny_model_dir, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        bench(tiny_model_dir, tmp_path / "B", **{"analysis": analysed, **SETTINGS} | wrong)
    assert not (tmp_path / "B").exists()


def test_reference_values_are_the_quartiles_of_all_layers_and_of_a_kind(finished, tiny_model_dir):
    _, found = finished
    loaded = load(str(tiny_model_dir))
    modules = site_modules(loaded.model)
    errors = {
        name: ((rounded(weight, 2) - weight).norm() / weight.norm()).item()
        for name, module in modules.items()
        for weight in [read_weight(module)]
    }
    rows = {(row["bits"], row["kind"]): row["relative_error"] for row in found["references"]}
    assert rows[2, "all"]["median"] == pytest.approx(np.median(list(errors.values())), rel=1e-4)
    assert rows[2, "all"]["sites"] == len(errors)
    down = [error for name, error in errors.items() if name.endswith("down_proj")]
    kind = next(site.kind for block in walk(loaded.model, torch.tensor([[1, 2, 3]])) for site in block.sites[-1:])
    assert rows[2, kind]["high"] == pytest.approx(np.quantile(down, 0.75), rel=1e-4)
    assert rows[2, "all"]["median"] > 1.5 * rows[3, "all"]["median"]


def test_a_bench_says_when_scores_have_seen_its_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A line of words. " * 60)
    public = cut_windows(make_tokenizer(), text.read_text(), length=8, count=2, source=str(text))
    seen = {"texts": {"public": {"source": str(text)}}}
    assert "this very text" in benching._same_text(seen, public, text)[0]
    assert benching._same_text({"texts": {"public": {"source": "another"}}}, public, text) == []
    assert benching._same_text(seen, public, None) == []

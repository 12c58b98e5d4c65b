"""Single points: the sizes they claim, and what is passed on of a trainer's guarantee."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from geoquant import charting, operating
from geoquant.cli.frontier import cells, pairs
from geoquant.errors import UserError
from geoquant.operating import Job, read_job
from geoquant.plan.points import Change, Point
from geoquant.runs import write_json

CLAIM = {"epsilon": 4.0, "delta": 1e-5, "adjacency": "one record added", "mechanism": "DP-SGD", "who": "a trainer"}


def test_a_job_is_read_as_it_was_written(tmp_path):
    point = Point("p", "own", {"rate": 3.0, "formats": ("dense",)}, Change("noise", 0.5), needs=("base",))
    job = Job(str(tmp_path), "key", point, {"model": "m", "formats": ("dense",)}, "b", ("t.jsonl",), 3, True, "command")
    write_json(tmp_path / "job.json", asdict(job))
    told = read_job(tmp_path / "job.json")
    assert told.recipe == job.recipe
    assert told.point.change == point.change
    assert asdict(told) | {"point": None} == asdict(job) | {"point": None}


def test_the_guarantee_of_a_trainer_is_passed_on_with_its_adjacency(tiny_model_dir, tmp_path):
    (tmp_path / "statement.json").write_text(json.dumps(CLAIM))
    points = charting._trained({str(tiny_model_dir): str(tmp_path / "statement.json")})
    assert [point.quantize for point in points] == [False, True]
    assert {point.family for point in points} == {"dp"}
    told = operating._inherited(points[0], str(tiny_model_dir))
    assert (told["epsilon"], told["delta"]) == (4.0, 1e-5)
    assert told["adjacency"].startswith("one record added")
    assert "as claimed by a trainer" in told["sentence"]
    assert "Does not cover" in told["sentence"]


def test_no_epsilon_without_a_statement(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"no statement .* epsilon, delta, adjacency, mechanism and who"):
        charting._trained({str(tiny_model_dir): str(tmp_path / "none.json")})
    (tmp_path / "bare.json").write_text(json.dumps(CLAIM | {"adjacency": ""}))
    (point, _) = charting._trained({str(tiny_model_dir): str(tmp_path / "bare.json")})
    with pytest.raises(UserError, match="lacks 'adjacency', and no guarantee is inherited without it"):
        operating._inherited(point, str(tiny_model_dir))


def test_what_is_not_coded_counts_as_it_is_stored():
    sites = [
        {"shape": [10, 20], "bits_per_weight": 3.0, "kept": 2, "kind": "mlp_in"},
        {"shape": [30, 10], "bits_per_weight": 5.0, "kept": 0, "kind": "embedding"},
    ]
    report = {"sites": sites, "model": {"parameters": 600}, "size": {"original_bytes": 1200}}
    found = operating._bits(report)
    assert found["all_in"] == pytest.approx((200 * 3 + 300 * 5 + 100 * 16) / 600)
    assert found["coded"] == pytest.approx((200 * 3 + 300 * 5) / 500)
    assert found["share"] == pytest.approx(500 / 600)
    assert found["embeddings"]
    assert found["kept"] == pytest.approx(2 * 10 / 500)


def test_a_process_that_failed_says_why(tmp_path):
    (tmp_path / "logs").mkdir()
    job, log = Job(str(tmp_path), "key", Point("p", "own"), {}), tmp_path / "logs" / "p.log"
    log.write_text('noise of a library\n"no text file x; give one"\n')
    assert charting._why(tmp_path, job, 2) == "no text file x; give one"
    assert "killed by signal 9" in charting._why(tmp_path, job, -9)
    log.write_text("Traceback\nZeroDivisionError: oops\n")
    assert charting._why(tmp_path, job, 1).startswith("ZeroDivisionError: oops (a bug: see")


def test_a_bug_in_one_point_leaves_its_traceback(tmp_path, monkeypatch):
    job = Job(str(tmp_path), "key", Point("p", "own"), {})
    monkeypatch.setattr(charting, "operate", lambda *_: 1 / 0)
    why = charting._here(tmp_path, job, lambda *_: None)
    assert why.startswith("ZeroDivisionError: division by zero (a bug: see")
    assert "1 / 0" in (tmp_path / "logs" / "p.log").read_text()


def test_a_model_and_its_statement_are_taken_apart():
    assert pairs(["a/b=c.json"]) == {"a/b": "c.json"}
    for wrong in ("a", "=c", "a="):
        with pytest.raises(UserError, match="wanted MODEL=STATEMENT"):
            pairs([wrong])


def test_a_row_of_the_terminal_has_dashes_for_what_was_not_measured():
    row = {
        "bits": {"all_in": 3.25},
        "public": {"delta": {"value": 0.1, "se": 0.01}},
        **dict.fromkeys(("domain", "primary", "exposure", "extraction", "guarantee")),
        "seconds": 2.0,
    }
    assert cells(row) == ["3.25", "+0.1000 (0.0100)", "–", "–", "–", "–", "–", "none", "2", "–"]

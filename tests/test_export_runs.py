"""Runs in the formats gptq and gguf: written, verified where a reader is installed, and honest where none is."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

from export_cases import small_llama
from geoquant import cli, exporting, finished, pipeline
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.export.verify import VerifyResult
from geoquant.model.load import load
from geoquant.pipeline import make_plan, quantize
from geoquant.plan import estimate
from geoquant.recipe import BOXED, Recipe
from geoquant.report.schema import check_schema
from gguf_cases import bpe_tokenizer

READER = all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum"))
without_reader = pytest.mark.skipif(READER, reason="gptqmodel and optimum are installed")
NEEDS = "reading it back needs gptqmodel and optimum; run: pip install gptqmodel optimum"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Recipe and folder of a run in both formats, with the gguf file verified for real. Read only."""
    place = tmp_path_factory.mktemp("formats")
    small_llama().save_pretrained(place / "tiny")
    bpe_tokenizer().save_pretrained(place / "tiny")
    (place / "text.txt").write_text(builtin_text()[:6000])
    recipe = Recipe(
        model=str(place / "tiny"),
        calibration=str(place / "text.txt"),
        evaluation=str(place / "text.txt"),
        windows=8,
        window=32,
        evaluation_windows=2,
        group_size=32,
        bits=3,
        metric="plain",
        formats=("gguf", "gptq"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
        quantize(recipe, place / "run")
    return recipe, place / "run"


@pytest.fixture
def run(done, tmp_path):
    shutil.copytree(done[1], tmp_path / "run")
    return tmp_path / "run"


def report_of(run) -> dict:
    report = json.loads((run / "report.json").read_text())
    check_schema(report)
    return report


def test_the_gguf_file_is_verified_by_transformers(done):
    report = report_of(done[1])
    gguf, gptq = report["exports"]
    assert (gguf["format"], gguf["path"], gguf["unread"]) == ("gguf", "gguf", None)
    assert gguf["verified"]["ok"]
    assert gguf["verified"]["readers"].keys() == {"torch", "transformers", "gguf"}
    assert gguf["bytes"] == (done[1] / "gguf/model.gguf").stat().st_size
    assert report["size"]["file_bits_per_weight"] == 4.5
    assert "14 sites: 3-bit codes are stored in 4 bits (Q4_0)" in report["warnings"]
    assert gptq["format"] == "gptq"


@without_reader
def test_nothing_is_claimed_of_what_no_reader_could_load(done, capsys):
    report = report_of(done[1])
    gptq = report["exports"][1]
    assert (gptq["verified"], gptq["unread"]) == (None, NEEDS)
    assert f"gptq was not verified: {NEEDS}" in report["warnings"]
    assert "Reading it back needs gptqmodel and optimum" in (done[1] / "report.html").read_text()
    with pytest.MonkeyPatch.context() as patch:
        good = VerifyResult(0.0, 0.0, 0.0, 1e-3, True, True, {"torch": "2"}, 0.1)
        patch.setattr("geoquant.export.verify.verify", lambda *_: good)
        assert cli.run(["verify", str(done[1]), "--json"]) == 0
        told = capsys.readouterr()
        assert [row["path"] for row in json.loads(told.out)["exports"]] == [str(done[1] / "gguf")]
        assert f"{done[1] / 'gptq'} was not verified: {NEEDS}" in told.err
    assert cli.run(["verify", str(done[1] / "gptq")]) == 2
    assert "back needs gptqmodel and optimum" in capsys.readouterr().err


def test_a_reader_that_comes_later_is_used(run, done, monkeypatch):
    """Where the packages are there, the same run verifies what it could not before."""
    report = report_of(run)
    report["exports"][1] |= {"verified": None, "unread": NEEDS}
    (run / "report.json").write_text(json.dumps(report))
    good = VerifyResult(0.0, 0.0, 0.0, 0.05, True, True, {"gptqmodel": "7"}, 0.1)
    for module in (exporting, finished):
        monkeypatch.setattr(module, "unread", lambda name: None)
    monkeypatch.setattr(exporting, "verify", lambda *_: good)
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    later = quantize(done[0], run, resume=True)
    assert later["exports"][1]["verified"]["ok"]
    assert later["exports"][1]["unread"] is None
    assert not any("was not verified" in warning for warning in later["warnings"])


@without_reader
def test_a_finished_run_without_a_reader_is_answered_at_once(run, done, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("nothing is missing"))
    assert quantize(done[0], run, resume=True) == report_of(run)


def test_a_run_with_a_gguf_file_only_can_be_measured(run):
    shutil.rmtree(run / "gptq")
    loaded = load(str(run), quantized=True)
    assert loaded.model.config.model_type == "llama"
    assert torch.isfinite(loaded.model(torch.arange(3, 30)[None]).logits).all()


def test_one_more_format_from_the_command_line(run, capsys):
    for name in ("gptq", "gguf"):
        shutil.rmtree(run / name)
        assert cli.run(["export", str(run), "--to", name, "--no-verify", "--json"]) == 0
        entry = json.loads(capsys.readouterr().out)
        assert (entry["format"], entry["verified"], entry["unread"]) == (name, None, None)
        assert (run / name).is_dir()
    assert {entry["format"] for entry in report_of(run)["exports"]} == {"gguf", "gptq"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.05, "method": "dqc", "formats": ("gguf",)}, "GGUF files hold no kept columns"),
        ({"group_size": 16, "formats": ("gguf",)}, "GGUF blocks hold 32 columns; got groups of 16"),
        ({"group_size": 40, "formats": ("gptq",)}, r"GPTQ readers know groups of 16, 32, 64"),
        ({"grid": "lattice", "method": "lattice", "formats": ("gptq",), "foldable": False}, "gptq needs column steps"),
        ({"grid": "lattice", "method": "lattice", "formats": ("gguf",), "foldable": False}, "gguf needs column steps"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_run(done, tmp_path, changes, message):
    box = BOXED | {"metric"} if "grid" in changes else ()
    values = {name: value for name, value in done[0].model_dump().items() if name not in box} | changes
    with pytest.raises(UserError, match=message):
        quantize(Recipe(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_float16_rounded_is_in_the_report(done, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    changes = {"bits": 5, "symmetric": False, "formats": ("gguf",), "verify": False, "method": "rtn"}
    quantize(done[0].model_copy(update=changes), tmp_path / "run")
    report = report_of(tmp_path / "run")
    (note,) = report["exports"][0]["notes"]
    assert "steps or offsets were rounded to float16; weights changed by at most" in note
    assert f"gguf: {note}" in report["warnings"]


def test_the_plan_says_how_large_the_files_will_be(done, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    report = report_of(done[1])
    for entry in report["exports"]:
        planned = make_plan(done[0].model_copy(update={"formats": (entry["format"],)}))
        assert planned["size"]["linear_bytes"] == entry["linear_bytes"]


def test_kept_columns_of_a_gptq_run_go_into_the_adapter(done, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    changes = {"keep": 0.05, "method": "dqc", "formats": ("gptq",), "verify": False}
    quantize(done[0].model_copy(update=changes), tmp_path / "run")
    (entry,) = report_of(tmp_path / "run")["exports"]
    assert entry["adapter_bytes"] > 0
    assert "PeftModel" in entry["snippet"]
    with pytest.raises(UserError, match=r"kept columns of .*gptq cannot be merged.*--to dense"):
        load(str(tmp_path / "run"), quantized=True)


@without_reader
def test_the_export_command_says_what_nobody_read(run, capsys):
    assert cli.run(["export", str(run), "--to", "gptq"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"gptq: {run / 'gptq'} (")
    assert second == f"not verified: {NEEDS}"

"""The tour, played on a model of two tiny blocks in place of SmolLM2."""

from __future__ import annotations

import json

import pytest
import torch

from geoquant import demo
from geoquant.data.private import DemoSettings
from geoquant.errors import UserError
from geoquant.model.load import load
from geoquant.plan import estimate
from geoquant.report.schema import check_schema

TINY = DemoSettings(
    members=12, nonmembers=12, canaries=2, epochs=1, batch=6, public_window=16, public_skip=10, public_count=3
)


@pytest.fixture
def stage(tiny_model_dir, monkeypatch):
    """Sets the scene: tiny settings, a tiny base, short texts; returns what was loaded and taught."""
    seen = {"loads": [], "lessons": 0}
    text = demo.builtin_text()[:12000]

    def tiny_base(spec, **options):
        seen["loads"].append(spec)
        assert spec == "demo"
        return load(str(tiny_model_dir), **options)

    def counted(*arguments, **options):
        seen["lessons"] += 1
        return lesson(*arguments, **options)

    lesson, wanted = demo.finetune, demo.recipe_for
    small = {"windows": 4, "window": 32, "evaluation_windows": 2, "group_size": 16, "metric": "plain", "verify": False}
    monkeypatch.setattr(demo, "DEMO", TINY)
    monkeypatch.setattr(demo, "load", tiny_base)
    monkeypatch.setattr(demo, "finetune", counted)
    monkeypatch.setattr(demo, "builtin_text", lambda: text)
    monkeypatch.setattr("geoquant.measure.builtin_text", lambda: text)
    monkeypatch.setattr(demo, "recipe_for", lambda out: wanted(out).model_copy(update=small))
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    return seen


def test_the_tour_plays_and_a_second_one_starts_from_the_taught_model(stage, tmp_path):
    out = tmp_path / "tour"
    phases = set()
    report = demo.run(out, lambda phase, *_: phases.add(phase))
    check_schema(report)
    assert stage == {"loads": ["demo"], "lessons": 1}
    assert {"unpack base", "finetune", "solve", "scores of the base", "scores (quantized)"} <= phases
    assert {path.name for path in out.iterdir()} == {"tour.json", "base", demo.FINETUNED, "records", "run"}
    assert {attack["subject"] for attack in report["privacy"]["attacks"]} == {"base", "original", "quantized"}
    assert {entry["subject"] for entry in report["privacy"]["exposure"]} == {"base", "original", "quantized"}
    assert report["privacy"]["n_members"] == 12
    base, taught = (load(str(out / name)).model for name in ("base", demo.FINETUNED))
    assert taught.dtype == torch.bfloat16
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), taught.parameters()))
    assert report["hashes"]["model"] == load(str(out / demo.FINETUNED)).sha256

    made = (out / demo.FINETUNED / "model.safetensors").stat().st_mtime_ns
    created = (out / "run" / "manifest.json").stat().st_mtime_ns
    again = demo.run(out)
    assert stage["lessons"] == 1
    assert (out / demo.FINETUNED / "model.safetensors").stat().st_mtime_ns == made
    assert (out / "run" / "manifest.json").stat().st_mtime_ns > created  # played again, not shown again
    for part in ("quality", "privacy", "size", "sites"):
        assert again[part] == report[part]


def test_a_tour_interrupted_anywhere_goes_on_by_the_same_command(stage, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    out = tmp_path / "tour"
    for moment in ("prepare", "score_reference", "measure_original", "measure_quantized", "write_report"):
        with monkeypatch.context() as patch:
            patch.setattr(f"geoquant.pipeline.{moment}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                demo.run(out)
    assert json.loads((out / "run" / "manifest.json").read_text())["status"] == "running"
    made = {path: path.stat().st_mtime_ns for path in (out / "run" / "sites").iterdir()}
    assert len(made) == 8
    check_schema(demo.run(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "run" / "sites").iterdir()} == made
    assert stage["lessons"] == 1


def test_a_lesson_that_was_interrupted_is_taken_again(stage, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def stop(*arguments, **options):
        raise Enough

    out = tmp_path / "tour"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "finetune", stop)
        with pytest.raises(Enough):
            demo.run(out)
    assert (out / "base").is_dir()
    assert not (out / demo.FINETUNED).exists()
    patched = []
    monkeypatch.setattr(demo, "quantize", lambda recipe, *_, **__: patched.append(recipe))
    demo.run(out)
    assert (out / demo.FINETUNED / "config.json").exists()
    assert patched[0].reference == str(out / "base")


def test_other_settings_and_fresh_start_over_and_strangers_are_left_alone(stage, tmp_path, monkeypatch):
    out = tmp_path / "tour"
    monkeypatch.setattr(demo, "quantize", lambda *_, **__: {})
    demo.run(out)
    demo.run(out)
    assert stage["lessons"] == 1
    demo.run(out, fresh=True)
    assert stage["lessons"] == 2
    monkeypatch.setattr(demo, "DEMO", DemoSettings(**{**TINY.__dict__, "seed": 8}))
    demo.run(out)
    assert stage["lessons"] == 3

    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("five years")
    for fresh in (False, True):
        with pytest.raises(UserError, match="not empty"):
            demo.run(stranger, fresh=fresh)
    assert (stranger / "thesis.tex").read_text() == "five years"

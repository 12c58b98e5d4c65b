"""A finished run that is resumed: answered at once when nothing is missing, and only what is missing made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from geoquant import exporting, pipeline
from geoquant.cli.options import RecipeFlags
from geoquant.cli.quantize import interrupted_recipe
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.export.verify import VerifyResult
from geoquant.manifest import check_same_recipe
from geoquant.pipeline import export, quantize
from geoquant.plan import estimate
from geoquant.recipe import Recipe
from geoquant.runs import file_hash, write_json

PASSING = ("created", "command", "timings", "peak_memory_bytes", "solver")


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model_dir):
    """Recipe and folder of a finished run to which `export` has added a dense model. Read only."""
    place = tmp_path_factory.mktemp("done")
    (place / "text.txt").write_text(builtin_text()[:6000])
    recipe = Recipe(
        model=str(tiny_model_dir),
        calibration=str(place / "text.txt"),
        evaluation=str(place / "text.txt"),
        windows=8,
        window=32,
        evaluation_windows=2,
        group_size=16,
        metric="plain",
        method="dqc",
        keep=0.05,
        verify=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
        quantize(recipe, place / "run")
    export(place / "run", "dense", verify=False)
    return recipe, place / "run"


@pytest.fixture
def run(done, tmp_path) -> Path:
    shutil.copytree(done[1], tmp_path / "run")
    return tmp_path / "run"


def made(folder: Path) -> dict[Path, tuple[int, str]]:
    """When each file was written and what it holds."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, file_hash(path))
        for path in folder.rglob("*")
        if path.is_file()
    }


def facts(report: dict) -> dict:
    """What a report says of the model, not of the process that wrote it or of the folder it lies in."""
    exports = [{key: value for key, value in entry.items() if key != "snippet"} for entry in report["exports"]]
    return {key: value for key, value in report.items() if key not in PASSING} | {"exports": exports}


def test_a_run_that_lacks_nothing_is_answered_at_once(done, run, monkeypatch):
    recipe, _ = done
    before, report = made(run), json.loads((run / "report.json").read_text())
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("there is nothing to do"))
    assert quantize(recipe, run, resume=True) == report
    assert [entry["format"] for entry in report["exports"]] == ["compressed-tensors", "dense"]
    assert made(run) == before
    with pytest.raises(UserError, match="was started with bits = 4; got 3"):
        quantize(recipe.model_copy(update={"bits": 3}), run, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        quantize(recipe, run)


def test_a_run_of_a_version_with_other_options_is_not_gone_on_with(done, run):
    """Today's default of an option that did not exist is not what that run did."""
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("target", "embeddings"):
        del manifest["recipe"][name]
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = made(run)
    with pytest.raises(UserError, match=r"another version.*differs in embeddings, target; .* choose a new folder$"):
        quantize(done[0], run, resume=True)
    assert made(run) == before


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "adapter", "dense"])
def test_only_the_export_that_was_lost_is_written_again(lost, done, run):
    recipe, _ = done
    before, report = made(run), json.loads((run / "report.json").read_text())
    shutil.rmtree(run / lost) if (run / lost).is_dir() else (run / lost).unlink()
    assert facts(quantize(recipe, run, resume=True)) == facts(report)
    after = made(run)
    assert {path: hash for path, (_, hash) in after.items() if path.parts[0] in ("model", "adapter", "dense")} == {
        path: hash for path, (_, hash) in before.items() if path.parts[0] in ("model", "adapter", "dense")
    }
    again = {path.parts[0] for path in after if path in before and after[path][0] != before[path][0]}
    packed = {"model", "adapter"}
    assert again & {"sites", "model", "adapter", "dense"} == ({"dense"} if lost == "dense" else packed)
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"


def test_a_site_that_was_lost_is_solved_again_and_everything_made_of_it(done, run):
    recipe, _ = done
    before, report = made(run), json.loads((run / "report.json").read_text())
    (lost := run / "sites" / "model.layers.1.mlp.down_proj.safetensors").unlink()
    # Measured on other weights, for all anybody knows.
    (run / "quantized.json").write_text((run / "quantized.json").read_text().replace('"kl": ', '"kl": 9'))
    assert facts(quantize(recipe, run, resume=True)) == facts(report)
    after = made(run)
    again = {path for path in after if after[path][0] != before[path][0]}
    assert {path for path in again if path.parts[0] == "sites"} == {lost.relative_to(run)}
    assert {"model", "adapter", "dense", "quantized.json"} <= {path.parts[0] for path in again}
    for path in (path for path in before if path.parts[0] in ("model", "adapter", "dense", "quantized.json")):
        assert after[path][1] == before[path][1], path


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_lost_report_is_written_again(name, done, run):
    (run / name).unlink()
    quantize(done[0].model_copy(update={"formats": ()}), run, resume=True)
    assert (run / name).exists()


def test_verification_asked_for_later_is_made_up_for(done, run, monkeypatch):
    asked = []

    def verify(folder, *_):
        asked.append(folder.name)
        return VerifyResult(0.0, 0.0, 0.0, 1e-3, True, True, {"torch": "2"}, 0.1)

    monkeypatch.setattr(exporting, "verify", verify)
    recipe = done[0].model_copy(update={"verify": True})
    before = made(run / "model")
    report = quantize(recipe, run, resume=True)
    assert [entry["verified"]["ok"] for entry in report["exports"]] == [True, True]
    assert asked == ["model", "dense"]
    assert quantize(recipe, run, resume=True) == report
    assert asked == ["model", "dense"]
    assert made(run / "model") == before


def test_an_export_that_was_found_wrong_is_written_and_verified_again(done, run, monkeypatch):
    results = [
        VerifyResult(1.0, 0.5, 0.1, 1e-3, False, True, {}, 0.1),
        VerifyResult(0.0, 0.0, 0.0, 1e-3, True, True, {}, 0.1),
    ]
    monkeypatch.setattr(exporting, "verify", lambda folder, *_: results[folder.name == "dense"])
    recipe = done[0].model_copy(update={"verify": True})
    before = made(run)
    with pytest.raises(UserError, match="does not reproduce the solved model"):
        quantize(recipe, run, resume=True)
    monkeypatch.setattr(exporting, "verify", lambda *_: results[1])
    report = quantize(recipe, run, resume=True)
    assert [entry["verified"]["ok"] for entry in report["exports"]] == [True, True]
    assert not any("does not reproduce" in warning for warning in report["warnings"])
    after = made(run)
    again = {path.parts[0] for path in before if after[path][0] != before[path][0]}
    assert again & {"model", "dense"} == {"model"}


@pytest.mark.parametrize(("gone", "new"), [("rate", {}), ("seed", {}), ("formats", {"format": "dense"})])
@pytest.mark.parametrize("grid", ["box", "lattice"])
def test_every_reader_of_a_manifest_tells_another_version_first(grid, gone, new, tmp_path):
    """Options that nobody gave were complained of instead."""
    written = Recipe(model="m", grid=grid).model_dump(mode="json")
    recipe = {name: value for name, value in written.items() if name != gone} | new
    write_json(tmp_path / "manifest.json", {"recipe": recipe, "hashes": {}, "status": "done"})
    differs = ", ".join(sorted([gone, *new]))
    said = f"another version of geoquant, whose options were others; got a recipe that differs in {differs}; go on"
    for read in (
        lambda: interrupted_recipe(tmp_path, RecipeFlags(seed=1)),
        lambda: export(tmp_path, "dense"),
        lambda: check_same_recipe(tmp_path, Recipe(model="m", grid=grid)),
    ):
        with pytest.raises(UserError, match=said):
            read()

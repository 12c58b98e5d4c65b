"""What a run is: its recipe, inputs and versions, written first; and on resume, whether it still is the same run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.measure import Texts
from geoquant.model.load import Loaded, identity, locate
from geoquant.recipe import Recipe, checked, located
from geoquant.runs import file_hash, read_json, recorded_recipe, write_json

__all__ = ["check_same_model", "check_same_recipe", "finish_manifest", "versions", "write_manifest"]

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "numpy", "peft")
DECISIVE = ("geoquant", "torch", "transformers")
# What is written of the solved model and whether it is reloaded: no number depends on it.
FREE = ("formats", "verify")
# Files that are the same wherever they lie.
BY_CONTENT = ("plan",)


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers."""
    from geoquant import __version__

    found = {"geoquant": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    run: Path, recipe: Recipe, loaded: Loaded, texts: Texts, split: Split | None, command: str
) -> tuple[str, ...]:
    """Write what the run is; on resume, refuse other inputs. Returns warnings for the report.

    Raises UserError when the model or the data differ from those the folder was started with.
    """
    path = run / "manifest.json"
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "hashes": hashes(recipe, loaded, texts, split),
        "versions": versions(),
        "seed": recipe.seed,
        "command": command,
        "status": "running",
    }
    if not path.exists():
        write_json(path, {**facts, "created": datetime.now(UTC).isoformat(timespec="seconds")})
        return ()
    kept = read_json(path, hashes=dict)
    for name, value in facts["hashes"].items():
        if kept["hashes"].get(name, value) != value:
            raise _changed(name, run)
    # What was once solved under other versions stays so, whatever the next attempt runs under.
    notes = tuple(dict.fromkeys([*kept.get("notes", ()), *other_versions(kept)]))
    again = kept | {"recipe": facts["recipe"], "status": "running"} | ({"notes": list(notes)} if notes else {})
    if again != kept:
        write_json(path, again)
    return notes


def check_same_recipe(run: Path, recipe: Recipe) -> None:
    """Raise UserError when the run was started with another recipe, or by a version that knew other options."""
    # Runs of old wrote paths as they were typed: they may go on where those still lead to the same place.
    started = located(checked(recorded_recipe(run)))
    for name in Recipe.model_fields:
        before, now = getattr(started, name), getattr(recipe, name)
        if name in BY_CONTENT and None not in (before, now):
            kept = read_json(run / "manifest.json", hashes=dict)["hashes"].get(name)
            if os.path.isfile(now) and file_hash(Path(now)) != kept:  # of one that is gone, who reads it says so
                raise _changed(name, run)
        elif before != now and name not in FREE:
            raise UserError(
                f"the run in {run} was started with {name} = {before!r}",
                got=repr(now),
                fix="resume with the same options, or choose a new folder",
            )


def _changed(name: str, run: Path) -> UserError:
    return UserError(f"the {name} changed since the run in {run} was started", fix="choose a new folder")


def other_versions(kept: dict) -> tuple[str, ...]:
    """A warning where the numbers are made by other software than when the run was started."""
    before, now = kept.get("versions", {}), versions()
    changed = [f"{name} {before[name]} -> {now[name]}" for name in DECISIVE if before.get(name, now[name]) != now[name]]
    if not changed:
        return ()
    return (f"resumed under other versions ({', '.join(changed)}): not bit for bit what one version would have given",)


def finish_manifest(run: Path) -> None:
    """Mark the run as complete."""
    write_json(run / "manifest.json", {**read_json(run / "manifest.json"), "status": "done"})


def check_same_model(run: Path, loaded: Loaded) -> None:
    """Raise UserError when the model of a finished run is no longer the one it was made from."""
    if read_json(run / "manifest.json", hashes=dict)["hashes"].get("model") != loaded.sha256:
        raise UserError(
            f"{loaded.source} is not the model that {run} was made from", fix="restore the original weights"
        )


def hashes(recipe: Recipe, loaded: Loaded, texts: Texts, split: Split | None) -> dict[str, str]:
    """SHA-256 of everything that went in."""
    found = {"model": loaded.sha256, "calibration": texts.calibration.sha256, "evaluation": texts.evaluation.sha256}
    if split:
        found["records"] = split.sha256
    for name in ("reference", "base"):
        if spec := getattr(recipe, name):
            where, extra, _ = locate(spec)
            found[name] = identity(where, extra)
    for name in ("private", "domain", "inherited", "plan"):
        if path := getattr(recipe, name):
            found[name] = file_hash(Path(path))
    return found

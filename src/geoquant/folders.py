"""Folders of commands that go on where they were: what may lie in one, and whether it is still the same work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from geoquant.errors import UserError
from geoquant.manifest import versions
from geoquant.runs import read_json, sweep, write_json

__all__ = ["begin", "claim", "made"]


def claim(folder: Path, ours: Collection[str], what: str) -> Path:
    """The folder if it is new, empty, or holds nothing but `ours`, the files of `what` ("an audit").

    Leftovers of a killed run are swept. Nothing is made. Raises UserError for a file, foreign files, no permission.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file", wanted="a folder")
        if folder.exists():
            sweep(folder)
            if foreign := sorted({entry.name for entry in folder.iterdir()} - set(ours)):
                raise UserError(
                    f"output folder {folder} holds {foreign[0]}, which is no part of {what}", fix="choose a new folder"
                )
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out folder") from None
    return folder


def made(folder: Path, *inside: str) -> Path:
    """The folder, there now with those `inside` it. Raises UserError where that cannot be."""
    try:
        for name in ("", *inside):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out folder") from None
    return folder


def begin(folder: Path, facts: dict, command: str, what: str, *inside: str) -> str:
    """Make the folder and those `inside` it, and write what the work is; or see that it is the same as before.

    facts: JSON-able, everything that decides the numbers. Returns their hash. Raises UserError where the folder holds
    other work.
    """
    key = hashlib.sha256(json.dumps([facts, versions()["geoquant"]], sort_keys=True).encode()).hexdigest()
    path = folder / "manifest.json"
    if path.exists():
        if read_json(path, key=str)["key"] != key:
            raise UserError(
                f"{folder} holds {what} of another model, other texts or settings", fix="choose a new folder"
            )
        return key
    made(folder, *inside)
    write_json(path, {"key": key, "command": command, **facts})
    return key

"""A folder of made records, and the statement by which an audit with them can be repeated.

DIR/
  members.jsonl nonmembers.jsonl holdout.jsonl   the three sides
  canaries.jsonl     all canaries; "included" says which of them were planted
  train.jsonl        one epoch as a model should see it: members, planted canaries as often as they repeat
  statement.json     domain, seed, arguments, versions, every coin, SHA-256 of the files above
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

from geoquant import __version__
from geoquant.data.jsonl import read_utf8
from geoquant.data.records import Record, read_records, write_records
from geoquant.data.synthetic import SIDES, MadeRecords
from geoquant.errors import UserError
from geoquant.runs import atomic_directory, file_hash, write_json

__all__ = ["STATEMENT", "check_output", "read_folder", "write_folder"]

STATEMENT = "statement.json"
SCHEMA = 1
KEPT = (*SIDES.values(), "canaries")  # files that hold what MadeRecords holds under the same name


def check_output(out: Path) -> None:
    """Raise UserError unless `out` is new or an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", wanted="a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"output folder {out} is not empty", fix="choose a new folder")


def write_folder(made: MadeRecords, out: str | Path, *, command: str | None = None) -> dict:
    """Write all files of `made` at once (`out` appears whole or not at all); returns the statement.

    command: what was typed to make it, without the place. Raises UserError when `out` is neither new nor empty.
    """
    out = Path(out)
    check_output(out)
    files = {name: getattr(made, name) for name in KEPT} | {"train": [Record(r.text) for r in made.training]}
    with atomic_directory(out) as folder:
        paths = {f"{name}.jsonl": folder / f"{name}.jsonl" for name, records in files.items() if records}
        for path in paths.values():
            write_records(path, files[path.stem])
        statement = describe(made) | {
            "files": {
                name: {"records": len(files[path.stem]), "sha256": file_hash(path)} for name, path in paths.items()
            },
            "command": command,
        }
        write_json(folder / STATEMENT, statement)
    return statement


def describe(made: MadeRecords) -> dict:
    """What the statement says of the records themselves."""
    records = [record for side in SIDES.values() for record in getattr(made, side)]
    return {
        "schema": SCHEMA,
        "domain": made.domain,
        "seed": made.seed,
        "arguments": made.arguments,
        "versions": {
            "geoquant": __version__,
            "faker": metadata.version("faker"),
            "python": platform.python_version(),
        },
        "counts": {name: len(getattr(made, name)) for name in KEPT}
        | {"included": len(made.split.canaries), "train": len(made.training)},
        "spans": dict(sorted(Counter(span.kind for record in records for span in record.fields).items())),
        "coins": {
            "records": made.sides,
            "canaries": {record.canary.name: record.canary.included for record in made.canaries},
        },
        "notes": made.notes,
    }


def read_folder(folder: str | Path) -> MadeRecords:
    """What `write_folder` wrote, after every file was found to be the one that the statement speaks of.

    Raises UserError: no statement, a damaged one, a file that is missing or changed.
    """
    folder = Path(folder)
    path = folder / STATEMENT
    try:
        statement = json.loads(read_utf8(path, "statement", "a folder that `geoquant records` made"))
        hashes = {name: entry["sha256"] for name, entry in statement["files"].items()}
        facts = {name: statement[name] for name in ("domain", "seed", "arguments", "notes")}
        sides = statement["coins"]["records"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}", fix="make the records again") from None
    for name, wanted in hashes.items():
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing", fix="make the records again")
        if file_hash(folder / name) != wanted:
            raise UserError(f"{folder / name} is not the file of {STATEMENT}: it changed", fix="make the records again")
    parts = {name: read_records(folder / f"{name}.jsonl") if f"{name}.jsonl" in hashes else () for name in KEPT}
    return MadeRecords(**facts, **parts, sides=sides)

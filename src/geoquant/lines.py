"""Work whose pieces are lines of a file: each is written as soon as it is done, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from geoquant.errors import UserError
from geoquant.progress import Progress

__all__ = ["each_once", "read_lines"]

Key = TypeVar("Key")


def each_once(
    path: Path,
    jobs: Sequence[Key],
    key_of: Callable[[dict], Key],
    begin: Callable[[], Callable[[Key], dict]],
    progress: Progress,
    phase: str,
    note: Callable[[Key], str] = str,
) -> dict[Key, dict]:
    """The line of every job, in the order of the jobs; those that are in the file are not done again.

    key_of: which job a line is of. begin: called once and only where a job is missing; gives what does one. What the
    lines hold must be JSON without NaN.
    """
    found = {key_of(line): line for line in read_lines(path)}
    missing = [job for job in jobs if job not in found]
    if missing:
        work = begin()
        for done, job in enumerate(missing, 1):
            found[job] = work(job)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[job], allow_nan=False) + "\n")
            progress(phase, done, len(missing), note(job))
    return {job: found[job] for job in jobs}


def read_lines(path: Path) -> list[dict]:
    """Whole lines; the last one of a killed run may be cut, is taken away and done again.

    Raises UserError for a broken line in the middle: nobody but another program wrote that.
    """
    if not path.exists():
        return []
    lines, kept = path.read_text(encoding="utf-8").splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(line)
            kept.append(value)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number} is damaged", fix="delete the line, or choose a new folder") from None
    whole = lines[: len(kept)]
    if whole and not whole[-1].endswith("\n"):
        whole[-1] += "\n"
    if whole != lines:
        path.write_text("".join(whole), encoding="utf-8")
    return kept

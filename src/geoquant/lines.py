"""Work whose pieces are lines of a file: each is written as soon as it is done, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TypeVar

from geoquant.progress import Progress
from geoquant.runs import atomic_write

__all__ = ["each_once", "read_lines"]

Key = TypeVar("Key")


def each_once(
    path: Path,
    jobs: Sequence[Key],
    key_of: Callable[[dict], Key],
    keys: Set[str],
    begin: Callable[[], Callable[[Key], dict]],
    progress: Progress,
    phase: str,
    note: Callable[[Key], str] = str,
) -> dict[Key, dict]:
    """The line of every job, in the order of the jobs; those that are in the file are not done again.

    key_of: which job a line is of. keys: what every line has. begin: called once and only where a job is missing; gives
    what does one. What the lines hold must be JSON without NaN.
    """
    found = {key_of(line): line for line in read_lines(path, keys)}
    missing = [job for job in jobs if job not in found]
    if missing:
        work = begin()
        for done, job in enumerate(missing, 1):
            found[job] = work(job)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[job], allow_nan=False) + "\n")
            progress(phase, done, len(missing), note(job))
    return {job: found[job] for job in jobs}


def read_lines(path: Path, keys: Set[str] = frozenset()) -> list[dict]:
    """Whole lines that have these keys, up to the first that is not one: a killed run may have cut its last one. What
    follows is taken away, and done again.
    """
    if not path.exists():
        return []
    written, kept = path.read_text(encoding="utf-8", errors="replace"), []
    for line in written.splitlines():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(one, dict) or not keys <= one.keys():
            break
        kept.append(one)
    whole = "".join(json.dumps(one) + "\n" for one in kept)
    if whole != written:
        atomic_write(path, lambda partial: partial.write_text(whole, encoding="utf-8") and None)
    return kept

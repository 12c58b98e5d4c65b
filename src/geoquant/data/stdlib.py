"""Records cut from the sources of Python's own standard library: real code, the same on every machine of one version.

Whole files go to a side, since pieces of one file resemble each other: whoever tests whether the sides can be told
apart without the model must keep the pieces of a file together as well (`notes["files"]`), or will find a difference
that no coin made. Most models have read these files before any fine-tune: calibrate attacks with the base model.
"""

from __future__ import annotations

import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from geoquant.data.domains import DOMAINS
from geoquant.data.records import Record
from geoquant.data.synthetic import SIDES, SMALLEST, MadeRecords, by_side, chance, flip_sides, plant
from geoquant.errors import UserError

__all__ = ["cut", "library_files", "stdlib_records"]

# Tests and installed packages; tables rather than code; the text that `data.text.builtin_text` calibrates with; what
# differs from machine to machine.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings"}
SKIPPED |= {"pydoc_data", "ensurepip", "__pycache__", "lib-dynload", "__phello__"}
SHORTEST = 200  # characters


def stdlib_records(
    n: int, seed: int = 0, *, characters: int = 800, canaries: int = 0, root: str | Path | None = None
) -> MadeRecords:
    """`n` pieces of up to `characters` characters on three sides, split by file; canaries are those of domain `code`.

    root: a folder of .py files, by default this Python's standard library. No private spans are marked. The same
    arguments under the same Python give the same records.

    Raises UserError for numbers out of range and where the files hold fewer pieces.
    """
    if characters < SHORTEST:
        raise UserError(f"cannot cut pieces of {characters} characters", wanted=f"at least {SHORTEST}")
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    owners: dict[str, str] = {}  # a text that occurs in several files belongs to the first
    for name, path in library_files(root):
        for text in cut(_source(path), characters):
            owners.setdefault(text, name)
    pieces = [(name, text) for text, name in owners.items()]
    if not SMALLEST <= n <= len(pieces):
        raise UserError(f"cannot cut {n} records from {root}", wanted=f"{SMALLEST} to {len(pieces)}")
    rng = chance("stdlib", seed, "records")
    chosen = [pieces[index] for index in sorted(rng.sample(range(len(pieces)), n))]
    names = sorted({name for name, _ in pieces})
    side_of = dict(zip(names, flip_sides(len(names), chance("stdlib", seed, "sides"))))
    sides = "".join(side_of[name] for name, _ in chosen)
    files = {
        side: list(Counter(name for name, _ in chosen if side_of[name] == letter).items())
        for letter, side in SIDES.items()
    }
    return MadeRecords(
        "stdlib",
        seed,
        sides,
        *by_side([Record(text) for _, text in chosen], sides),
        plant(DOMAINS["code"], canaries, seed, set()),
        {"n": n, "characters": characters, "canaries": canaries, "python": platform.python_version()},
        {"files": files},
    )


def library_files(root: Path) -> list[tuple[str, Path]]:
    """(name below `root`, path) of every source file that is taken, by name."""
    found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return sorted(
        (name.as_posix(), path)
        for name, path in found
        if not SKIPPED & set(name.parts[:-1]) and not name.name.startswith("_sysconfigdata")
    )


def cut(source: str, characters: int) -> Iterator[str]:
    """Neighbouring paragraphs of `source` together, SHORTEST to `characters` characters; the rest is dropped."""
    piece = ""
    for paragraph in [*re.split(r"\n(?:[ \t]*\n)+", source), ""]:
        paragraph = paragraph.strip("\n").rstrip()
        joined = f"{piece}\n\n{paragraph}" if piece else paragraph
        if paragraph and len(joined) <= characters:
            piece = joined
            continue
        if SHORTEST <= len(piece) <= characters:
            yield piece
        piece = paragraph


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""

"""`geoquant export`: one more format from a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import library, output, progress_display

__all__ = ["export"]


def export(
    run: Annotated[Path, Parameter(help="Folder of a finished run.")],
    /,
    *,
    to: Annotated[str, Parameter(help="Format: see `geoquant list formats`.")],
    verify: Annotated[bool, Parameter(negative="--no-verify", help="Reload it in a fresh process and compare.")] = True,
    json: Json = False,
) -> None:
    """Write the codes of a finished run in one more format; nothing is solved again.

    For example:

      geoquant export RUN --to dense
    """
    from geoquant.errors import unknown_name
    from geoquant.export import FORMATS

    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    with output(json) as result:
        with progress_display() as progress:
            pipeline = library("pipeline", progress)
            written = pipeline.export(run, to, verify=verify, progress=progress)
        result(written, lambda: show(run, written))


def show(run: Path, written: dict) -> None:
    """What was written where, what that changed, and whether somebody could read it back."""
    print(f"{written['format']}: {run / written['path']} ({written['bytes'] / 1e6:,.1f} MB)")
    for note in written["notes"]:
        print(f"note: {note}")
    if written["unread"]:
        print(f"not verified: {written['unread']}")

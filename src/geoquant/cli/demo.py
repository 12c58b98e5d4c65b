"""`geoquant demo`: the whole tour on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import library, output, progress_display
from geoquant.cli.summary import show_summary

__all__ = ["demo"]


def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder for the tour.")] = Path("runs/demo"),
    fresh: Annotated[bool, Parameter(help="Start over, the fine-tuned model included.", show_default=False)] = False,
    json: Json = False,
) -> None:
    """Fine-tune a small model on invented private records, compress it, and measure what it still reveals.

    Takes about nine minutes on two cores; needs no network. A second run reuses the fine-tuned model.

    For example:

      geoquant demo
      geoquant demo --out runs/mine --fresh
    """
    with output(json) as result:
        with progress_display() as progress:
            tour = library("demo", progress)
            report = tour.run(out, progress, fresh)
        result(report, lambda: show_summary(report, out / "run"))

"""`geoquant analyze`: which weights matter, and to which text?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Base, Device, Domain, Json, Model, Private, command_line
from geoquant.cli.screen import library, output, progress_display

__all__ = ["analyze"]


def analyze(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder for analysis.json, analysis.html and the scores.")],
    base: Base = None,
    private: Private = None,
    domain: Domain = None,
    text: Annotated[
        str | None, Parameter(help="Public text, .txt or .jsonl (default: the text every Python carries).")
    ] = None,
    windows: Annotated[int, Parameter(help="Windows of --text, its first ones."), WHOLE] = 8,
    window: Annotated[int, Parameter(help="Tokens per window, and at most of a record."), WHOLE] = 512,
    records: Annotated[int, Parameter(help="Records read of each file, its first ones."), WHOLE] = 48,
    bits: Annotated[int, Parameter(help="Codes of the plain rounding whose error scores weigh."), WHOLE] = 3,
    classes: Annotated[
        bool, Parameter(help="Class every layer's columns too, and measure how rounding bends its rows.")
    ] = False,
    seed: Annotated[int, Parameter(help="Seed of the nulls."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Score the columns, rows and groups of every layer, each with its standard error and with what it would be where
    nothing is to be found.

    For example:

      geoquant analyze MODEL --out ANALYSIS
      geoquant analyze TUNED --base BASE --private in.jsonl --domain other.jsonl --out ANALYSIS
    """
    with output(json) as result:
        with progress_display() as progress:
            analysis = library("analysis", progress)
            found = analysis.analyze(
                model,
                out,
                base=base,
                private=private,
                domain=domain,
                text=text,
                windows=windows,
                window=window,
                records=records,
                bits=bits,
                classes=classes,
                seed=seed,
                device=device,
                progress=progress,
                command=command_line(),
            )
        result(found, lambda: show(found, out))


def show(found: dict, out: Path) -> None:
    """The findings and where the rest is."""
    for sentence in found["findings"]:
        print(sentence)
    print(f"to explore: {out / 'analysis.html'}")

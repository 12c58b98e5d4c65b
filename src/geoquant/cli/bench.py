"""`geoquant bench geometry`: which score foretells the harm of rounding a layer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Base, Device, Domain, Json, Model, Private, command_line
from geoquant.cli.screen import library, output, progress_display

__all__ = ["bench"]


def bench(
    what: Annotated[Literal["geometry"], Parameter(help="The benchmark; there is one.")],
    model: Model,
    /,
    *,
    analysis: Annotated[Path, Parameter(help="Folder of a finished `geoquant analyze` of MODEL.")],
    out: Annotated[Path, Parameter(help="Folder for bench.json, bench.html and the effects.")],
    base: Base = None,
    private: Private = None,
    domain: Domain = None,
    text: Annotated[
        str | None, Parameter(help="Public text to measure on (default: the end of the text every Python carries).")
    ] = None,
    windows: Annotated[int, Parameter(help="Windows of --text, its first ones."), WHOLE] = 8,
    window: Annotated[int, Parameter(help="Tokens per window."), WHOLE] = 256,
    records: Annotated[int, Parameter(help="Records read of each file, its first ones."), WHOLE] = 100,
    bits: Annotated[
        list[Annotated[int, WHOLE]] | None, Parameter(help="Bit widths, repeatable (default: 2, 3 and 4).")
    ] = None,
    seed: Annotated[int, Parameter(help="Seed of intervals and permutations."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Round every layer alone, measure the harm, rank every score of an analysis by how well it foretells it.

    ANALYSIS is what `geoquant analyze MODEL --out ANALYSIS` wrote.

    For example:

      geoquant bench geometry MODEL --analysis ANALYSIS --out BENCH
      geoquant bench geometry MODEL --analysis ANALYSIS --out BENCH3 --bits 3 --windows 20
    """
    with output(json) as result:
        with progress_display() as progress:
            benching = library("benching", progress)
            found = benching.bench(
                model,
                out,
                analysis=analysis,
                base=base,
                private=private,
                domain=domain,
                text=text,
                windows=windows,
                window=window,
                records=records,
                bits=tuple(bits or benching.BITS),
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
    print(f"all predictors: {out / 'bench.html'}")

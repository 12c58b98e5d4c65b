"""`geoquant identify`: what are these weights for, by what happens without them?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Base, Device, Domain, Json, Model, Private, command_line
from geoquant.cli.screen import library, output, progress_display

__all__ = ["identify"]


def identify(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder for identity.json, identity.html and the effects.")],
    groups: Annotated[
        str,
        Parameter(
            help="What is changed at a time: site, half (attention or MLP of a block), block, depth:K (attention or "
            "MLP of K stretches of blocks, the same groups in every model), columns:N (N blocks of columns of every "
            "layer), top:SCORE@SHARE (of every layer, and as many columns at random)."
        ),
    ] = "half",
    only: Annotated[str | None, Parameter(help="Leave out layers whose name does not hold this.")] = None,
    do: Annotated[
        list[str] | None,
        Parameter(
            help="What is done to it, repeatable: quantize@BITS, zero, noise@SHARE, revert, clip@QUANTILE (default: "
            "quantize@3, with --base also revert)."
        ),
    ] = None,
    base: Base = None,
    private: Private = None,
    domain: Domain = None,
    canaries: Annotated[str | None, Parameter(help="Canaries planted in the training data, .jsonl.")] = None,
    task: Annotated[list[Path] | None, Parameter(help="Multiple-choice items, .jsonl, repeatable.")] = None,
    items: Annotated[int | None, Parameter(help="Items of each task, its first ones (default: all)."), WHOLE] = None,
    analysis: Annotated[
        Path | None, Parameter(help="Folder of a finished `geoquant analyze` of MODEL, judged by the labels.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        Parameter(help="Folder of another finished `geoquant identify`, repeatable: do labels of groups agree?"),
    ] = None,
    text: Annotated[
        str | None, Parameter(help="Public text to measure on (default: the end of the text every Python carries).")
    ] = None,
    windows: Annotated[int, Parameter(help="Windows of --text, its first ones."), WHOLE] = 8,
    window: Annotated[int, Parameter(help="Tokens per window."), WHOLE] = 256,
    records: Annotated[int, Parameter(help="Records read of each file, its first ones."), WHOLE] = 50,
    lam: Annotated[float, Parameter(help="Preference for privacy in the overlap weight, 0 to 1.")] = 0.5,
    seed: Annotated[int, Parameter(help="Seed of noise, controls and permutations."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Change one group of weights at a time, measure what the model can still do and what it still gives away, and
    label the group: functional, sensitive, both or neither.

    For example:

      geoquant identify MODEL --out IDENTITY
      geoquant identify TUNED --base BASE --private in.jsonl --domain other.jsonl --out IDENTITY
      geoquant identify MODEL --analysis ANALYSIS --groups top:dsm@0.01 --do zero --out TOP
      geoquant identify MODEL --groups depth:8 --do quantize@3 --compare OTHER --out STRETCHES
    """
    with output(json) as result:
        with progress_display() as progress:
            identifying = library("identifying", progress)
            found = identifying.identify(
                model,
                out,
                analysis=analysis,
                compare=tuple(compare or ()),
                base=base,
                private=private,
                domain=domain,
                canaries=canaries,
                tasks=tuple(task or ()),
                items=items,
                text=text,
                windows=windows,
                window=window,
                records=records,
                do=tuple(do or ()),
                groups=groups,
                only=only,
                lam=lam,
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
    print(f"every group and its decision: {out / 'identity.html'}")

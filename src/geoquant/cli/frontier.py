"""`geoquant frontier`: the control matrix of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Base, Device, Json, Model, command_line
from geoquant.cli.screen import library, output, progress_display, stdout_console

__all__ = ["frontier"]


def frontier(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder for frontier.json, frontier.html and the points.")],
    base: Base = None,
    members: Annotated[str | None, Parameter(help="Audit: records it was trained on, .jsonl.")] = None,
    nonmembers: Annotated[str | None, Parameter(help="Audit: records of the same kind it was not trained on.")] = None,
    canaries: Annotated[str | None, Parameter(help="Audit: canaries planted in the training data.")] = None,
    private: Annotated[
        str | None, Parameter(help="For levers: other records it was trained on that they may look at.")
    ] = None,
    domain: Annotated[str | None, Parameter(help="For levers: other records of the kind that it never saw.")] = None,
    points: Annotated[Path | None, Parameter(help="TOML file of points (default: every lever and baseline).")] = None,
    tasks: Annotated[
        list[Path] | None, Parameter(name="--task", help="Multiple-choice items, .jsonl; repeatable.")
    ] = None,
    items: Annotated[int | None, Parameter(help="Items taken of each task (default: all)."), WHOLE] = None,
    dp: Annotated[
        list[str] | None,
        Parameter(help="MODEL=STATEMENT: trained with DP-SGD, and what its trainer claims, .json; repeatable."),
    ] = None,
    text: Annotated[
        str | None, Parameter(help="Public text to measure on (default: the end of the text every Python carries).")
    ] = None,
    calibration: Annotated[
        str | None, Parameter(help="Calibration text (default: the text every Python carries).")
    ] = None,
    windows: Annotated[int | None, Parameter(help="Calibration windows (default 32)."), WHOLE] = None,
    window: Annotated[int | None, Parameter(help="Tokens per window (default 512)."), WHOLE] = None,
    evaluation_windows: Annotated[int | None, Parameter(help="Windows measured (default 20)."), WHOLE] = None,
    jobs: Annotated[int, Parameter(help="Points at a time, each a process; they share the threads."), WHOLE] = 1,
    chosen: Annotated[
        str | None,
        Parameter(help="Point compared with the baselines, by name or goal (default: the best with a lever)."),
    ] = None,
    keep: Annotated[bool, Parameter(help="Keep every point's whole run, not only its report.")] = False,
    seed: Annotated[int, Parameter(help="Seed of the audit's bootstrap and of noise."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure size, quality and leakage of many operating points, and mark those that no other beats.

    Points that are measured are kept: the same command goes on after an interruption, and adds new points.

    For example:

      geoquant frontier TUNED --base BASE --members in.jsonl --nonmembers out.jsonl --out DIR
      geoquant frontier TUNED --base BASE --points points.toml --jobs 4 --out DIR
      geoquant quantize MODEL --goal private --frontier DIR --base BASE --out RUN
    """
    given = {
        **{"members": members, "nonmembers": nonmembers, "canaries": canaries, "evaluation": text},
        **{"calibration": calibration, "windows": windows, "window": window},
        **{"evaluation_windows": evaluation_windows, "seed": seed, "device": device},
    }
    with output(json) as result:
        from geoquant.plan.points import read_points

        listed = None if points is None else read_points(points)
        trained = pairs(dp or [])
        with progress_display() as progress:
            found = library("charting", progress).frontier(
                model,
                out,
                base=base,
                private=private,
                domain=domain,
                points=listed,
                tasks=tasks or [],
                items=items,
                dp=trained,
                jobs=jobs,
                keep=keep,
                chosen=chosen,
                options={name: value for name, value in given.items() if value is not None},
                progress=progress,
                command=command_line(),
            )
        result(found, lambda: show(found, out))


def pairs(given: list[str]) -> dict[str, str]:
    """MODEL=STATEMENT, taken apart. Raises UserError."""
    from geoquant.errors import UserError

    found = {}
    for one in given:
        folder, _, statement = one.partition("=")
        if not folder or not statement:
            raise UserError(f"--dp {one}", wanted="MODEL=STATEMENT.json")
        found[folder] = statement
    return found


def show(found: dict, out: Path) -> None:
    """The matrix, what was left out or failed, and where the page is."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{found['model']['name']}: * no other point beats it", title_justify="left")
    table.add_column("point")
    heads = ("bits", "public", "unseen", "AUC", "TPR", "exposure", "extracted", "guarantee", "seconds", "over plain")
    for head in heads:
        table.add_column(head, justify="right")
    for row in found["rows"]:
        table.add_row(("* " if row["pareto"] else "  ") + row["name"], *cells(row))
    console = stdout_console()
    console.print(table)
    print("public, unseen: loss above the original's, nats per token (paired SE); bits: of all parameters")
    if found.get("costs"):
        console.print(found["costs"], soft_wrap=True)
    for row in found["rows"]:
        if row["guarantee"]:  # no epsilon without what it covers and what it does not
            console.print(f"{row['name']}: {escape(row['guarantee']['sentence'])}", soft_wrap=True)
    for line in (found["baselines"]["sentence"], *(one["verdict"] for one in found["baselines"]["families"])):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for line in (*found["left_out"], *(f"failed: {one['name']}: {one['error']}" for one in found["failed"])):
        console.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
    print(f"report: {out / 'frontier.html'}")


def cells(row: dict) -> list[str]:
    """One line of the table."""
    attack, secret, spans, sure = row["primary"], row["exposure"], row["extraction"], row["guarantee"]
    tpr = attack and attack["tpr"]
    return [
        f"{row['bits']['all_in']:.2f}",
        change(row["public"]),
        change(row["domain"]),
        "–" if not attack else f"{attack['auc']:.2f} [{attack['ci'][0]:.2f}, {attack['ci'][1]:.2f}]",
        "–" if not tpr else f"{100 * tpr['value']:.0f}% at {100 * tpr['fpr']:g}%",
        "–" if not secret else f"{secret['mean']:.1f}",
        "–" if not spans else f"{spans['extracted']} of {spans['spans']}",
        "none" if not sure else f"ε {sure['epsilon']:g}, δ {sure['delta']:g}: {sure['adjacency']}",
        f"{row['seconds']:.0f}",
        "–" if not (cost := row.get("cost")) or cost["extra"] is None else f"{cost['extra']:+.0f}",
    ]


def change(text: dict | None) -> str:
    """A rise of the loss and its error."""
    return "–" if text is None else f"{text['delta']['value']:+.4f} ({text['delta']['se']:.4f})"

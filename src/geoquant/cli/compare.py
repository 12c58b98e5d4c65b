"""`geoquant compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import output, stdout_console
from geoquant.cli.summary import columns_table, metrics
from geoquant.errors import UserError

__all__ = ["compare"]

BOX_ONLY, LATTICE_ONLY = ("bits", "group_size", "symmetric", "keep"), ("rate", "embeddings")
ALWAYS = ("metric", "order", "target", "sequential", "calibration", "windows")
MOVED = ("plan", "anchor", "aim", "forget", "forget_weight")
REFINED = ("refine", "refine_privacy", "refine_blocks", "refine_geometry", "refine_threshold", "refine_lowered")
CONTROL = (*MOVED, *REFINED, "epsilon", "delta", "radius", "shards", "clip", "inherited")
SETTINGS = ("grid", *LATTICE_ONLY, "method", *BOX_ONLY, *ALWAYS, *CONTROL)


def compare(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs.")],
    json: Json = False,
) -> None:
    """Put the sizes, quality and leakage of several runs in one table; only settings that differ are listed.

    For example:

      geoquant compare RUN4 RUN3
      geoquant compare runs/* --json
    """
    if not runs:
        raise UserError("no runs given", wanted="folders of finished runs", fix="e.g. geoquant compare RUN4 RUN3")
    with output(json) as result:
        from geoquant.runs import read_json

        reports = {str(run): read_json(run / "report.json", model=dict, size=dict, quality=dict) for run in runs}
        result({"runs": [facts(run, report) for run, report in reports.items()]}, lambda: show(reports))


def facts(run: str, report: dict) -> dict:
    """What a script would want to compare, unrounded."""
    return {
        "run": run,
        "model": report["model"],
        "recipe": report.get("recipe"),
        "size": report["size"],
        "quality": report["quality"],
        "privacy": report.get("privacy"),
    }


def show(reports: dict[str, dict]) -> None:
    """One column per run; the originals in front, once per distinct model."""
    headers, columns = [], []
    originals: dict[str, dict] = {}
    for report in reports.values():
        originals.setdefault(original_key(report), report)
    for report in originals.values():
        headers.append(f"{report['model'].get('name')} (original)")
        columns.append(metrics(report, "original"))
    differing = [name for name in SETTINGS if len({setting(report, name) for report in reports.values()}) > 1]
    for run, report in reports.items():
        headers.append(run)
        settings = {name.replace("_", " "): setting(report, name) for name in differing}
        columns.append(settings | metrics(report, "quantized"))
    order = [*(name.replace("_", " ") for name in differing), *columns[-1]]
    columns = [{label: column.get(label, "–") for label in [*order, *column]} for column in columns]
    stdout_console().print(columns_table("", headers, columns))
    texts = {(report["quality"].get("text"), report["quality"].get("windows")) for report in reports.values()}
    if len(texts) > 1:
        print("note: these runs measured perplexity on different texts; their perplexities cannot be compared")


def setting(report: dict, name: str) -> str:
    """What the run was given, or a dash where its grid has no such thing."""
    recipe = report.get("recipe") or {}
    idle = {"lattice": BOX_ONLY, "box": LATTICE_ONLY}.get(recipe.get("grid"), ())
    if name in idle:
        return "–"
    if name == "method" and recipe.get("keep") and recipe.get("grid") != "lattice":
        return "dqc"  # what keeps columns
    if name in CONTROL and (not recipe.get(name) or (name == "aim" and not recipe.get("anchor"))):
        return "–"  # a lever that was not used, or that an older version did not have
    return str(recipe.get(name))


def original_key(report: dict) -> str:
    """Runs of one model on one text share their original's column."""
    quality = report["quality"]
    return repr((report["model"].get("name"), quality["original"], quality.get("text")))

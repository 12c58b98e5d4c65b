"""`geoquant plan`: a dry run; with budgets, a choice for the whole model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json, Model, RecipeFlags
from geoquant.cli.screen import duration, library, output, progress_display, stdout_console

__all__ = ["plan"]

BUDGETS = "Budgets"


def plan(
    model: Model | None = None,
    /,
    *,
    recipe: Annotated[Path | None, Parameter(help="TOML file with these options; flags win.")] = None,
    max_size: Annotated[
        float | None, Parameter(help="Megabytes that weights may take, codes and what stays at 16 bits.", group=BUDGETS)
    ] = None,
    max_loss: Annotated[
        float | None, Parameter(help="Loss on public text, nats per token more than the model as it is.", group=BUDGETS)
    ] = None,
    max_domain_loss: Annotated[
        float | None, Parameter(help="The same on records of the private kind (needs --domain).", group=BUDGETS)
    ] = None,
    max_leak: Annotated[
        float | None,
        Parameter(
            help="Loss gap between --domain and --private records, nats per token beyond the base's.", group=BUDGETS
        ),
    ] = None,
    minimise: Annotated[str, Parameter(help="What else to spare: loss, size or leak.", group=BUDGETS)] = "loss",
    effects: Annotated[
        Path | None, Parameter(help="File that keeps what was measured, for other budgets.", group=BUDGETS)
    ] = None,
    out: Annotated[Path | None, Parameter(help="File for the plan, .json.", group=BUDGETS)] = None,
    flags: RecipeFlags = RecipeFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> None:
    """What `quantize` would do with the same options: each site's codes, sizes, time, memory. Writes nothing.

    With a budget, measures what every part of the model would change instead, and chooses for each how many bits it
    gets and, with --base, how much of its change from the base it keeps: the least loss within all budgets, and what a
    little more of each would buy. These are forecasts, additive and of first and second order: the audit of a run is
    the measurement.

    For example:

      geoquant plan MODEL --bits 4
      geoquant plan MODEL --bits 3 --keep 0.01 --method dqc --json
      geoquant plan TUNED --base BASE --private in.jsonl --domain other.jsonl --max-size 60 --max-leak 0.1 --out P.json
    """
    with output(json) as result:
        wanted = flags.recipe(model, recipe)
        asked = {"size": max_size, "loss": max_loss, "domain_loss": max_domain_loss, "leak": max_leak}
        with progress_display() as progress:
            if any(value is not None for value in asked.values()):
                planning = library("planning", progress)
                budgets = planning.Budgets(**asked)
                found = planning.plan_within(
                    wanted, budgets, minimise=minimise, effects=effects, out=out, progress=progress
                )
                result(found, lambda: show_choice(found))
                return
            _refuse_alone(minimise, effects, out)
            pipeline = library("pipeline", progress)
            planned = pipeline.make_plan(wanted, progress)
        result(planned, lambda: show(planned))


def _refuse_alone(minimise: str, effects: Path | None, out: Path | None) -> None:
    """Raise UserError for what only a choice within budgets has."""
    from geoquant.errors import UserError

    for flag, given in (("--minimise", minimise != "loss"), ("--effects", effects), ("--out", out)):
        if given:
            raise UserError(f"{flag} belongs to a plan within budgets", wanted="--max-size, --max-loss or --max-leak")


def show_choice(found: dict) -> None:
    """Bits and kept shares by block and kind, totals, and what budgets are worth."""
    from rich.table import Table

    kinds = list(dict.fromkeys(unit["kind"] for unit in found["units"]))
    table = Table(title="bits per weight @ share of the change from the base", title_justify="left", title_style="bold")
    for header in ("block", *kinds):
        table.add_column(header, justify="right")
    blocks = list(dict.fromkeys(unit["block"] for unit in found["units"]))
    for block in blocks:
        cells = [
            " ".join(chosen(unit) for unit in found["units"] if (unit["block"], unit["kind"]) == (block, kind))
            for kind in kinds
        ]
        table.add_row("–" if block is None else str(block), *cells)
    stdout_console().print(table)
    totals = found["totals"]
    print(f"size: {totals['size'] / 8e6:,.1f} MB")
    for name, words in (("public", "public text"), ("domain", "unseen records of the private kind")):
        if name in totals:
            print(f"loss on {words}: {totals[name]:+.4f} nats per token (forecast)")
    if found["gap"] is not None:
        print(f"loss gap: {found['gap']['before']:.3f} -> {found['gap']['after']:.3f} nats per token (forecast)")
    for sentence in found["sentences"]:
        print(sentence)
    print("no formal guarantee" + (f"; plan: {found['plan']}" if found["plan"] else ""))
    if found["next"] is not None:
        print(f"next: {found['next']}")


def chosen(unit: dict) -> str:
    """One unit's bits and share."""
    bits = "16" if unit["bits"] is None else f"{unit['bits']:g}"
    return f"{bits}@{unit['share']:g}"


def show(planned: dict) -> None:
    """The plan as a table, alike sites of all blocks on one line."""
    from rich.table import Table

    console = stdout_console()
    table = Table(title=f"plan for {name_of(planned['model'])}", title_justify="left", title_style="bold")
    for header in ("sites", "", "shape", "bits", "group", "bits/weight", "method", "why"):
        table.add_column(header, justify="right" if header in ("", "bits", "group", "bits/weight") else "left")
    for pattern, sites in alike(planned["sites"]):
        site = sites[0]
        table.add_row(
            pattern,
            f"x{len(sites)}",
            " x ".join(str(size) for size in site["shape"]),
            "–" if site["bits"] is None else str(site["bits"]),
            "–" if site["bits"] is None else str(site["group_size"]),
            f"{site['bits_per_weight']:.2f}",
            site["method"],
            site["reason"],
        )
    console.print(table)
    for warning in planned.get("warnings") or []:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    for line in (*sizes(planned["size"]), *estimates(planned["estimate"])):
        print(line)


def name_of(model: object) -> str:
    """The model's name, whether the plan holds it alone or with its facts."""
    return str(model.get("name", model) if isinstance(model, dict) else model)


def alike(sites: list[dict]) -> list[tuple[str, list[dict]]]:
    """Sites that differ only in the number of their block, under their name with the numbers as `*`."""
    found: dict[tuple[str, ...], list[dict]] = {}
    for site in sites:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", site["name"])
        decided = (str(value) for name, value in sorted(site.items()) if name not in ("name", "block"))
        found.setdefault((pattern, *decided), []).append(site)
    return [(key[0] if len(group) > 1 else group[0]["name"], group) for key, group in found.items()]


def sizes(size: dict) -> list[str]:
    """Bytes before and after, bits per weight."""
    lines = []
    if size.get("bits_per_weight") is not None:
        lines.append(f"bits per weight: {size['bits_per_weight']:.3f}")
    if size.get("original_bytes") and size.get("total_bytes"):
        share = size["total_bytes"] / size["original_bytes"]
        before, after = size["original_bytes"] / 1e6, size["total_bytes"] / 1e6
        lines.append(f"on disk: {before:,.1f} MB -> {after:,.1f} MB ({share:.0%})")
    return lines


def estimates(estimate: dict) -> list[str]:
    """Time, memory and work, as far as the plan knows them."""
    lines = []
    if estimate.get("seconds") is not None:
        lines.append(f"time: about {duration(estimate['seconds'])}")
    if estimate.get("memory_bytes") is not None:
        lines.append(f"peak memory: about {estimate['memory_bytes'] / 2**30:.1f} GiB")
    if estimate.get("gemm_flops") is not None:
        lines.append(f"work in matrix products: {estimate['gemm_flops'] / 1e12:,.1f} TFLOP")
    return lines

"""`geoquant plan`: a dry run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json, Model, RecipeFlags
from geoquant.cli.screen import duration, library, output, progress_display, stdout_console

__all__ = ["plan"]


def plan(
    model: Model | None = None,
    /,
    *,
    recipe: Annotated[Path | None, Parameter(help="TOML file with these options; flags win.")] = None,
    flags: RecipeFlags = RecipeFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> None:
    """What `quantize` would do with the same options: each site's codes, sizes, time, memory. Writes nothing.

    For example:

      geoquant plan MODEL --bits 4
      geoquant plan MODEL --bits 3 --keep 0.01 --method dqc --json
    """
    with output(json) as result:
        wanted = flags.recipe(model, recipe)
        with progress_display() as progress:
            pipeline = library("pipeline", progress)
            planned = pipeline.make_plan(wanted, progress)
        result(planned, lambda: show(planned))


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

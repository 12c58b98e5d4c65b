"""`geoquant explain`: what was decided for one site, and why, in numbers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import output, stdout_console
from geoquant.errors import UserError

__all__ = ["explain", "find_site", "limit_lines", "sentences"]


def explain(
    run: Annotated[Path, Parameter(help="Folder of a finished run.")],
    site: Annotated[
        str | None, Parameter(help="Site, e.g. model.layers.3.mlp.down_proj, or the end of its name.")
    ] = None,
    /,
    *,
    json: Json = False,
) -> None:
    """What was decided for a site of a run and why; without SITE, all of them in a table.

    For example:

      geoquant explain RUN
      geoquant explain RUN 3.mlp.down_proj
    """
    with output(json) as result:
        from geoquant.runs import read_json

        sites = read_json(run / "report.json", sites=list)["sites"]
        if site is None:
            result({"sites": sites}, lambda: show_all(sites))
        else:
            chosen = find_site(site, sites)
            result(chosen, lambda: print("\n".join(sentences(chosen, sites))))


def find_site(name: str, sites: list[dict]) -> dict:
    """The site of that name, or the only one whose name ends with it. Raises UserError."""
    exact = [site for site in sites if site["name"] == name]
    ending = exact or [site for site in sites if site["name"].endswith(f".{name}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UserError(f"{len(ending)} sites end with {name!r}", wanted="one site", fix=f"e.g. {ending[0]['name']}")
    names = [site["name"] for site in sites]
    below = [full for full in names if f".{name}." in f".{full}"]
    if below:
        listed = ", ".join(below[:8]) + (", ..." if len(below) > 8 else "")
        count = f"{len(below)} sites lie" if len(below) > 1 else "1 site lies"
        raise UserError(f"{name!r} is no site, but {count} below it", wanted="one site", fix=f"choose from: {listed}")
    # Compare with ends of the same depth, so that a short name finds its long one.
    depth = name.count(".") + 1
    ends = {".".join(full.split(".")[-depth:]): full for full in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    close = close or [ends[end] for end in difflib.get_close_matches(name, ends, n=1, cutoff=0.6)]
    close = close or [full for full in names if name in full]
    hint = f"did you mean {close[0]!r}?" if close else "see all: geoquant explain RUN"
    raise UserError(f"unknown site {name!r}", fix=hint)


def sentences(site: dict, sites: list[dict]) -> list[str]:
    """The decision in words, each with its number and where that number stands among all sites."""
    shape = " x ".join(str(size) for size in site.get("shape") or [])
    width = "unbounded" if site["bits"] is None else f"{site['bits']} bits"
    lines = [
        f"{site['name']}  ({shape}, {str(site.get('kind') or 'linear').replace('_', ' ')})",
        f"  method        {site.get('method')}, {site.get('order')} order, damping {site.get('damping')}",
        f"  codes         {width}; {fixed(site.get('bits_per_weight'))} bits per weight all told",
        f"  reason        {site.get('reason')}",
    ]
    if site.get("kept"):
        columns = (site.get("shape") or [0, 0])[1]
        share = f" ({site['kept'] / columns:.1%} of {columns})" if columns else ""
        kept = site.get("kept_columns") or []
        listed = ", ".join(str(column["column"] if isinstance(column, dict) else column) for column in kept[:8])
        more = ", ..." if len(kept) > 8 else ""
        lines.append(
            f"  kept          {site['kept']} columns at 16 bits{share}" + (f": {listed}{more}" if kept else "")
        )
    error, heldout = site.get("error"), site.get("heldout_error")
    lines.append(f"  error         {scientific(error)} of the site's output energy on calibration tokens")
    if heldout is not None:
        lines.append(f"                {scientific(heldout)} on the tokens that chose the damping")
    if error and site.get("expected_error"):
        lines.append(
            f"  certificate   expected {scientific(site['expected_error'])}, so achieved / expected = "
            f"{error / site['expected_error']:.2f}"
        )
    if error and site.get("bound"):
        clip = site.get("clip_rate") or 0.0
        kept = error <= site["bound"] * 1.0001
        if clip:
            promise = f"but no promise: {clip:.2%} of the codes were clipped"
        else:
            promise = "as promised: no code was clipped" if kept else "although no code was clipped"
        word = "not exceeded" if kept else "exceeded"
        lines.append(f"  bound         {scientific(site['bound'])} {word}, {promise}")
    lines += limit_lines(site)
    if site.get("expected_loss") is not None:
        lines.append(
            f"  step          {scientific(site['step'])}: expected loss {scientific(site['expected_loss'])} nats; "
            f"largest code {site['largest_code']}"
        )
    massive = site.get("massive_tokens")
    if massive and massive["largest"]:  # embeddings have no input of their own
        lines.append(
            f"  input         the largest token has {massive['largest']:,.0f} times the median energy; the top 0.1% "
            f"of tokens hold {massive['top_share']:.1%} of it"
        )
    place = rank(site, sites)
    if place is not None:
        lines.append(f"  rank          {place}")
    return lines


def limit_lines(site: dict) -> list[str]:
    """The sphere bound, what lies between it and the expectation, and what a reduction of the basis could gain."""
    gap, headroom, rows = site.get("gap_db"), site.get("headroom_db"), site.get("rows_db") or 0.0
    if gap is None or headroom is None:  # plain rounding, or a report that is older than these numbers
        return []
    taken = f", {rows:.2f} that rows take over from each other to lower the loss" if rows >= 0.005 else ""
    box = "" if site.get("bits") is None else "; the box of codes would not survive it"
    lines = [
        f"  sphere bound  {scientific(site.get('sphere_bound'))}: no lattice of this density could expect less; the "
        f"expectation lies {gap:.2f} dB above,",
        f"                {gap - headroom - rows:.2f} because a cube is no ball, {headroom:.2f} headroom{taken}",
    ]
    if site.get("error") is not None and site.get("sphere_bound") and site["error"] < site["sphere_bound"]:
        lines.append(
            "                (the achieved error lies below: it knows no damping, and steps may be as long as weights)"
        )
    lines.append(
        f"  reduction     could lower the expected error by {1 - 10 ** (-headroom / 10):.1%} at most (the headroom, "
        f"known without running LLL or BKZ){box}"
    )
    profile = site.get("profile") or {}
    ranges = [
        f"{label} {profile[key][-1]:+.1f} to {profile[key][0]:+.1f} dB"
        for key, label in (("lengths", "lengths r"), ("steps", "with their steps, r s,"))
        if profile.get(key) and None not in profile[key]
    ]
    if ranges:
        lines.append(f"  profile       {'; '.join(ranges)} around the geometric mean (of squares)")
    return lines


def rank(site: dict, sites: list[dict]) -> str | None:
    """Where the site's held-out error (or calibration error) stands among all."""
    key = "heldout_error" if site.get("heldout_error") is not None else "error"
    if site.get(key) is None:
        return None
    values = sorted((other[key] for other in sites if other.get(key) is not None), reverse=True)
    median = values[len(values) // 2]
    place = values.index(site[key]) + 1
    return f"{place} of {len(values)} by error, largest first (median {scientific(median)})"


def show_all(sites: list[dict]) -> None:
    """Every site on one line."""
    from rich.table import Table

    table = Table()
    for header in ("site", "method", "bits/weight", "kept", "error", "held out", "clipped"):
        table.add_column(header, justify="left" if header in ("site", "method") else "right")
    for site in sites:
        table.add_row(
            site["name"],
            str(site.get("method")),
            fixed(site.get("bits_per_weight") or site["bits"]),
            str(site.get("kept") or 0),
            scientific(site.get("error")),
            scientific(site.get("heldout_error")),
            f"{site.get('clip_rate') or 0.0:.2%}",
        )
    stdout_console().print(table)


def scientific(value: float | None) -> str:
    """Three digits, whatever the size."""
    return "–" if value is None else f"{value:.3g}"


def fixed(value: float | None) -> str:
    """Two decimals."""
    return "–" if value is None else f"{value:.2f}"

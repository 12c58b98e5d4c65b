"""The page of an analysis: a map of every score over blocks and kinds of sites, each site's columns, and sentences."""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from geoquant.model.walk import within
from geoquant.outliers.appraise import DRAWS
from geoquant.outliers.score_findings import headlines, score_findings
from geoquant.report.origins import clip_panel, residual_panel, sink_map
from geoquant.report.page import fingerprint, finite, rendered, write_page

__all__ = ["render", "write_analysis"]


def render(found: dict) -> str:
    """The page of what `geoquant.analyze` returned."""
    mark, found = fingerprint(found), finite(found)
    parts = list(dict.fromkeys(within(site["name"]) for site in found["sites"]))
    cells: dict[tuple, list[int]] = {}
    for index, site in enumerate(found["sites"]):
        cells.setdefault((site["block"], within(site["name"])), []).append(index)
    blocks = list(dict.fromkeys(site["block"] for site in found["sites"]))
    counts = found["settings"]["parts"], found.get("nulls", {}).get("draws", DRAWS)
    of_scores = set(score_findings(found["sites"], found["scores"], *counts))
    under = counted(len(found["scores"]), "score")
    return rendered(
        "analysis.html.jinja",
        scripts=("copy.js", "analysis.js"),
        p=found,
        headline=f"{found['model']['name']}: {len(found['sites'])} layers under {under}.",
        fingerprint=mark,
        parts=parts,
        rows=[(block, [cells.get((block, part), []) for part in parts]) for block in blocks],
        first=first_shown([score["name"] for score in found["scores"]]),
        figures=origin_figures(found["origins"]),
        other=[one for one in found["findings"] if one not in of_scores],
        headlines=headlines(found["sites"], found["scores"], *counts),
        worst=[(score, largest(found["sites"], score["name"])) for score in found["scores"]],
        data=embedded({"scores": found["scores"], "sites": found["sites"], "bits": found["settings"]["bits"]}),
    )


def first_shown(names: list[str]) -> str | None:
    """The score that the map opens with: what most of its readers came for, and not the first by alphabet."""
    return next((name for name in ("privacy_memory", "fisher_private", "hop_row_weighted") if name in names), None)


def origin_figures(known: dict) -> list[tuple[str, str, Markup]]:
    """(heading, caption, drawing) of what origins can be drawn."""
    residuals, curves = known["residuals"], known["clipping"]["curves"]
    drawn = [
        ("Attention on the sink", "Blocks down, heads across; darker for more.", sink_map(known["sinks"]["mass"])),
        (
            "The residual stream",
            "Its largest value over its median; dashed: normal numbers.",
            residual_panel(residuals["largest"], residuals["typical"], residuals["gaussian"]),
        ),
    ]
    for curve in curves[:1]:
        caption = f"{curve['site']}, {known['clipping']['bits']} bits, the worst of its kind without a clip."
        drawn.append(("Clipped, rounded, both", caption, clip_panel(curve)))
    return [one for one in drawn if one[2]]


def largest(sites: list[dict], name: str, count: int = 3) -> list[dict]:
    """The sites with the most of a score."""
    known = [site for site in sites if site["scores"].get(name, {}).get("value") is not None]
    return sorted(known, key=lambda site: -site["scores"][name]["value"])[:count]


def counted(count: int, what: str) -> str:
    """One score, two scores."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def embedded(value: object) -> Markup:
    """JSON that no content can end early: it stands in a script element of a type that is never run."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def write_analysis(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write analysis.json and analysis.html, each by rename of a complete file."""
    return write_page(folder, "analysis", render(found), found)

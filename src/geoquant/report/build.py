"""Turn the `report.json` of a run into one HTML file that needs nothing else (see page.py).

`words.py` computes sentences from the numbers, `figures.py` draws, `template.html.jinja` only lays out.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from geoquant.report import figures, profiles
from geoquant.report.control import control_sentences, moved_rows
from geoquant.report.curve import curve_panel, dots
from geoquant.report.leakage import leakage
from geoquant.report.page import fingerprint, finite, rendered, write_page
from geoquant.report.schema import check_schema
from geoquant.report.words import SUBJECTS, extraction_total, headline, strongest, weight

__all__ = ["fingerprint", "render", "write_report"]

KINDS = {
    "attention_in": "attention in",
    "attention_out": "attention out",
    "mlp_in": "MLP in",
    "mlp_out": "MLP out",
    "other": "other",
    "embedding": "embedding",
    "head": "head",
    "tied": "embedding and head",
}
MODEL_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}

# --- tables and panels ---


def original_bits(report: dict) -> int | None:
    """Bits per weight before, from the dtype's name."""
    return MODEL_BITS.get(str(report["model"]["dtype"]).removeprefix("torch."))


def size_bars(report: dict) -> list[dict]:
    """Rows of the size figure: label, bytes, bar, parts. The dtype gives the original's linear part."""
    sizes, bits = report["size"], original_bits(report)
    total, kept = sizes["total_bytes"] or 0, sizes["kept_bytes"] or 0
    linear, original = (sizes["linear_bytes"] or 0) - kept, sizes["original_bytes"] or 0
    weights = sum(math.prod(site["shape"]) for site in report["sites"])
    before = min(weights * (bits or 0) / 8, original)
    scale = max(total, original, 1)

    def row(label: str, whole: float, parts: list[tuple[str, float, str]]) -> dict:
        told = [(css, amount, f"{name}: {figures.size(amount)}") for css, amount, name in parts if amount > 0]
        text = f"{label}, {figures.size(whole)}: " + "; ".join(tip for *_, tip in told)
        return {"label": label, "bytes": whole, "bar": figures.stacked_bar(told, scale, text), "parts": told}

    rest = "embeddings, norms, head"
    return [
        row(
            "Original",
            original,
            [("b-linear0", before, "linear weights"), ("b-rest", original - before, rest)],
        ),
        row(
            "Quantized",
            total,
            [
                ("b-linear", linear, "codes and scales"),
                ("b-kept", kept, "kept columns"),
                ("b-rest", total - linear - kept, rest),
            ],
        ),
    ]


def by_name(sites: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Sites by (last part of their names, kind); by kind alone where names are too many."""
    leaf = {site["name"]: site["name"].rsplit(".", 1)[-1] for site in sites}
    fine = len(set(leaf.values())) <= 12
    groups: dict[tuple[str, str], list[dict]] = {}
    for site in sites:
        kind = KINDS.get(site["kind"], str(site["kind"]))
        groups.setdefault((leaf[site["name"]] if fine else kind, kind), []).append(site)
    return groups


def layer_panels(sites: list[dict]) -> dict:
    """Panels of errors and of profiles by name, each kind on one shared scale, and what the text around them says."""
    groups = by_name(sites)
    fields = ("error", "heldout_error", "expected_error", "clip_rate")
    drawn = {
        key: [figures.LayerPoint(site["name"], site["block"] or 0, *map(site.get, fields)) for site in group]
        for key, group in groups.items()
    }
    points = [point for group in drawn.values() for point in group]
    values = [v for p in points for v in (p.error, p.heldout, p.expected) if v is not None and v > 0]
    domain = (min(values) / 1.15, max(values) * 1.15) if values else (0.001, 1.0)
    clip_top = max((point.clip or 0 for point in points), default=0)
    blocks = max((point.block for point in points), default=0) + 1
    panels = [
        {
            "name": name,
            "kind": kind,
            "svg": figures.layer_panel(name, group, blocks=blocks, domain=domain, clip_top=clip_top),
        }
        for (name, kind), group in drawn.items()
    ]
    ratios = [p.heldout / p.error for p in points if p.error and p.heldout]
    worst = sorted(sites, key=lambda site: -(site["heldout_error"] or site["error"] or 0))[:8]
    return {
        "panels": panels,
        "profiles": profiles.profile_panels(groups),
        "limits": profiles.limits(sites),
        "clip_top": clip_top,
        "ratio": (median(ratios), max(ratios)) if ratios else None,
        "worst": worst,
        "solvers": sorted({(str(site["method"]), str(site["order"])) for site in sites}),
    }


def curves(goal: dict | None) -> list:
    """Where the shipped point sits among those it was chosen from; nothing where none was measured."""
    if goal is None or not goal["rows"]:
        return []
    panels = (
        curve_panel(dots(goal["rows"], loss, goal["point"]), f"rise of perplexity on {words}", small=True)
        for loss, words in (("public", "public text"), ("domain", "unseen records"))
    )
    return [panel for panel in panels if panel]


# --- the page ---


def render(report: dict) -> str:
    """The whole page as one string. Raises `UserError` where the report breaks the contract."""
    check_schema(report)
    mark = fingerprint(report)
    report = finite(report)
    privacy = report["privacy"]
    return rendered(
        "template.html.jinja",
        r=report,
        headline=headline(report),
        per_weight=weight(report["sites"]),
        fingerprint=mark,
        original_bits=original_bits(report),
        size_bars=size_bars(report),
        strongest={subject: strongest(privacy, subject) for subject in SUBJECTS},
        extraction={subject: extraction_total(privacy, subject) for subject in SUBJECTS},
        layers=layer_panels(report["sites"]),
        kept=sorted((site for site in report["sites"] if site["kept"]), key=lambda site: -site["kept"]),
        holder="quantized weights",
        goal=report.get("goal"),
        control=control_sentences(report),
        moved=moved_rows(report),
        curves=curves(report.get("goal")),
        **leakage(privacy, SUBJECTS, report["warnings"]),
    )


def write_report(run: Path, report: dict) -> tuple[Path, Path]:
    """Write report.json and report.html into the run folder, each by rename of a complete file."""
    return write_page(run, "report", render(report), report)

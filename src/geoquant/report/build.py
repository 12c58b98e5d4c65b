"""Turn the `report.json` of a run into one HTML file that needs nothing else.

The page carries its own style, figures and (tiny, optional) script; a Content-Security-Policy that names
their hashes keeps everything else out, so a hostile model name can neither load nor run anything. `words.py`
computes sentences from the numbers, `figures.py` draws, `template.html.jinja` only lays out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from geoquant import runs
from geoquant.report import figures, profiles
from geoquant.report.schema import check_schema
from geoquant.report.words import (
    SUBJECTS,
    attack_label,
    extraction_total,
    headline,
    p_value,
    strongest,
    untested,
    weight,
)

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
ESTIMATORS = {
    "digits-bound": "a lower bound from the probability of the digits",
    "sampled-rank": "rank among random values in the same place",
    "exact-rank": "exact rank",
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


def by_group(rows: Iterable[dict], key: str) -> dict[str, list[dict]]:
    """Rows gathered by `key` in order of appearance, subjects in the order base, original, quantized."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    order = list(SUBJECTS)
    return {
        name: sorted(found, key=lambda row: order.index(row["subject"]) if row["subject"] in order else len(order))
        for name, found in groups.items()
    }


def roc_panels(privacy: dict) -> list[dict]:
    """One panel per attack, on both axes; the log axis starts where the non-members stop resolving."""
    floor = min(10.0 ** math.floor(math.log10(1 / max(privacy["n_nonmembers"], 10))), 0.01)
    panels = []
    for name, rows in by_group(privacy["attacks"], "name").items():
        curves = [
            figures.Curve(
                row["subject"],
                SUBJECTS.get(row["subject"], row["subject"]),
                row["auc"],
                roc["fpr"],
                roc["tpr"],
            )
            for row in rows
            if (roc := row["roc"]) and roc.get("fpr") and None not in (*roc["fpr"], *roc["tpr"])
        ]
        if curves:
            label = attack_label(name)[0]
            drawn = {
                axis: figures.roc_panel(label, curves, log=axis == "log", floor=floor) for axis in ("log", "linear")
            }
            panels.append({"label": label, "curves": curves, **drawn})
    return panels


def exposure_table(privacy: dict) -> dict:
    """Canaries by subject: subjects, rows of (name, repeats, {subject: {bits, ci}}), means, limit."""
    found = sorted(privacy["exposure"], key=lambda row: [*SUBJECTS, row["subject"]].index(row["subject"]))
    rows: dict[str, tuple[int, dict[str, dict]]] = {}
    for entry in found:
        for canary in entry["canaries"]:
            rows.setdefault(canary["name"], (canary["repeats"], {}))[1][entry["subject"]] = {
                "ci": None,
                **canary,
            }
    return {
        "subjects": [entry["subject"] for entry in found],
        "rows": sorted(((name, *row) for name, row in rows.items()), key=lambda row: (row[1] or 0, row[0])),
        "means": {entry["subject"]: entry["mean_bits"] for entry in found},
        "limit": max((entry["limit_bits"] or 0 for entry in found), default=0),
        "estimators": sorted({ESTIMATORS.get(entry["estimator"], str(entry["estimator"])) for entry in found}),
    }


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


# --- the page ---


def finite(value: object) -> object:
    """The same value with NaN and infinities as None, which JSON has and they are not."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(report: dict) -> str:
    """SHA-256 of report.json exactly as `write_report` writes it: what a signature on the page refers to."""
    text = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots, and copies without marks."""
    return Markup(".<wbr>").join(name.split("."))


def code(text: str) -> Markup:
    """Text with `backticks` as code elements."""
    pieces = [escape(piece) for piece in text.split("`")]
    return Markup("").join(Markup("<code>") + p + Markup("</code>") if i % 2 else p for i, p in enumerate(pieces))


def tight(sentence: str) -> str:
    """The sentence with no line break between a number and its unit, nor around an arrow."""
    return re.sub(r"(?<=\d) (?=[kMGT]B)| (?=→)|(?<=→) ", "\u00a0", sentence)


@cache
def _part(name: str) -> str:
    return resources.files("geoquant.report").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        {name: getattr(figures, name) for name in ("cell_axis", "dot_interval", "level_bar")},
        attack_label=attack_label,
        subjects=SUBJECTS,
    )
    environment.filters.update(
        change=figures.change,
        change_error=figures.change_error,
        number=figures.number,
        fixed=figures.plain_number,
        percent=figures.percent,
        spread=figures.spread,
        bytes=figures.size,
        breakable=breakable,
        code=code,
        tight=tight,
        p_value=p_value,
    )
    return environment.from_string(_part("template.html.jinja"))


def render(report: dict) -> str:
    """The whole page as one string. Raises `UserError` where the report breaks the contract."""
    check_schema(report)
    mark = fingerprint(report)
    report = finite(report)
    privacy, style, script = report["privacy"], _part("style.css"), _part("copy.js")
    return _template().render(
        r=report,
        headline=headline(report),
        per_weight=weight(report["sites"]),
        fingerprint=mark,
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        original_bits=original_bits(report),
        size_bars=size_bars(report),
        strongest={subject: strongest(privacy, subject) for subject in SUBJECTS},
        extraction={subject: extraction_total(privacy, subject) for subject in SUBJECTS},
        attacks=by_group(privacy["attacks"], "name") if privacy else {},
        fprs=sorted({rate for a in privacy["attacks"] for rate in a["tpr_at_fpr"]}, key=lambda k: -float(k))
        if privacy
        else [],
        rocs=roc_panels(privacy) if privacy else [],
        extracted=by_group(privacy["extraction"], "kind") if privacy else {},
        exposure=exposure_table(privacy) if privacy else None,
        untested=untested(privacy) if privacy else [],
        layers=layer_panels(report["sites"]),
        kept=sorted((site for site in report["sites"] if site["kept"]), key=lambda site: -site["kept"]),
    )


def write_report(run: Path, report: dict) -> tuple[Path, Path]:
    """Write report.json and report.html into the run folder, each by rename of a complete file."""
    page = render(report)
    runs.write_json(run / "report.json", finite(report))
    runs.atomic_write(run / "report.html", lambda partial: partial.write_text(page, encoding="utf-8") and None)
    return run / "report.json", run / "report.html"

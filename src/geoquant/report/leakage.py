"""The section on leakage: what templates need to lay out the `privacy` part of a report, or an audit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from geoquant.report import figures
from geoquant.report.words import attack_label, controls, untested

__all__ = ["leakage"]

ESTIMATORS = {
    "digits-bound": "a lower bound from the probability of the digits",
    "sampled-rank": "rank among random values in the same place",
    "exact-rank": "exact rank",
}
# Keys of a guarantee in a report, in the order in which a page tells them.
GUARANTEE = {
    "epsilon": "Epsilon",
    "delta": "Delta",
    "adjacency": "For neighbours",
    "mechanism": "Mechanism",
    "scope": "Covers",
    "files": "Other files",
    "not_covered": "Does not cover",
    "assumes": "Taken to be true, and not checked",
    "again": "Once more",
    "noise": "Price",
}


def leakage(privacy: dict | None, subjects: dict[str, str], told: Iterable[str] = ()) -> dict:
    """Everything that leakage.html.jinja reads. subjects: model -> label, in their order. told: warnings that the page
    shows elsewhere."""
    given = privacy or {"attacks": [], "extraction": [], "exposure": [], "n_nonmembers": 0}
    guarantee = (privacy or {}).get("guarantee")
    if privacy and not privacy["n_members"]:
        privacy = None  # a guarantee, and no attack
    return {
        "p": privacy,
        "guarantee": guarantee and {label: guarantee[key] for key, label in GUARANTEE.items() if guarantee.get(key)},
        "subjects": subjects,
        "told": tuple(told),
        "attacks": by_group(given["attacks"], "name", subjects),
        "fprs": sorted({rate for a in given["attacks"] for rate in a["tpr_at_fpr"]}, key=lambda k: -float(k)),
        "rocs": roc_panels(given, subjects),
        "extracted": by_group(given["extraction"], "kind", subjects),
        "prompted": by_group(given.get("prompted") or [], "kind", subjects),
        "suffixes": by_group(given.get("suffixes") or [], "prefix", subjects),
        "exposure": exposure_table(given, subjects),
        "controls": controls(privacy, subjects) if privacy else [],
        "untested": untested(privacy) if privacy else [],
    }


def by_group(rows: Iterable[dict], key: str, subjects: dict[str, str]) -> dict[str, list[dict]]:
    """Rows gathered by `key` in order of appearance, the models of each in the order of `subjects`."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    order = list(subjects)
    return {
        name: sorted(found, key=lambda row: order.index(row["subject"]) if row["subject"] in order else len(order))
        for name, found in groups.items()
    }


def roc_panels(privacy: dict, subjects: dict[str, str]) -> list[dict]:
    """One panel per attack, on both axes; the log axis starts where the non-members stop resolving."""
    floor = min(10.0 ** math.floor(math.log10(1 / max(privacy["n_nonmembers"], 10))), 0.01)
    panels = []
    for name, rows in by_group(privacy["attacks"], "name", subjects).items():
        curves = [
            figures.Curve(
                row["subject"],
                subjects.get(row["subject"], row["subject"]),
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


def exposure_table(privacy: dict, subjects: dict[str, str]) -> dict:
    """Canaries by subject: subjects, rows of (name, repeats, {subject: {bits, ci}}), means, limit."""
    found = sorted(privacy["exposure"], key=lambda row: [*subjects, row["subject"]].index(row["subject"]))
    rows: dict[str, tuple[int, dict[str, dict]]] = {}
    for entry in found:
        again = Counter()
        for canary in entry["canaries"]:
            again[canary["name"]] += 1  # a name that several canaries share stands for each of them
            name = canary["name"] + (f" ({again[canary['name']]})" if again[canary["name"]] > 1 else "")
            rows.setdefault(name, (canary["repeats"], {}))[1][entry["subject"]] = {
                "ci": None,
                **canary,
            }
    return {
        "subjects": [entry["subject"] for entry in found],
        "rows": sorted(((name, *row) for name, row in rows.items()), key=lambda row: (row[1] or 0, row[0])),
        "means": {entry["subject"]: entry["mean_bits"] for entry in found},
        "limit": max((entry["limit_bits"] or 0 for entry in found), default=0),
        "bounds": any(entry["estimator"] == "digits-bound" for entry in found),
        "estimators": sorted({ESTIMATORS.get(entry["estimator"], str(entry["estimator"])) for entry in found}),
    }

"""The control matrix: a row for every operating point, and which of them nothing beats.

Axes, smaller is better on each:

    size      bits per parameter of the whole model, all-in; differences up to SIZE count as none
    public    mean loss on public text, nats per token
    domain    mean loss on the non-members: records of the members' kind that neither training nor any lever has seen
    leakage   |AUC - 1/2| of one attack, two-sided: an attack that finds the over-forgotten counts too

The noise of a difference is Z times its paired standard error: over windows (public), over records (domain), and by
DeLong's paired test over records (leakage), each of the same windows and records under both models. The attack is the
one calibrated by the base where there is one, else the strongest on the original; it is the same for all points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from scipy.stats import norm

from geoquant.plan.goals import SAME as SIZE
from geoquant.plan.pareto import beats, undominated
from geoquant.plan.points import Point
from geoquant.privacy.attacks import ATTACKS, JOINT
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.statistics import auc

__all__ = [
    "AXES",
    "RULE",
    "Z",
    "control_matrix",
    "exposure_row",
    "noise_of",
    "outward",
    "paired",
    "strongest_alone",
    "values_of",
]

PRIMARY = "reference"
Z = float(norm.ppf(0.975))
AXES = ("size", "public", "domain", "leakage")
RULE = (
    "A point is marked if no other beats it. One beats another if it is better by more than the noise on one axis and "
    f"worse by more than the noise on none. Axes: size (noise {SIZE:g} bits per parameter), loss on public text, loss "
    "on unseen records of the members' kind, leakage |AUC - 0.5|; elsewhere noise is 1.96 paired standard errors."
)


def control_matrix(points: Sequence[Point], measured: Sequence[Mapping]) -> dict:
    """Rows in the order of the points, the first of which is the original; the axes that could be measured; attacks.

    measured: what operating.operate returned for each point. A row that is not marked names one that beats it.
    """
    first = measured[0]
    named = attack_names(first)
    rows = [_row(point, one, first, named) for point, one in zip(points, measured, strict=True)]
    values, noise = values_of(rows), noise_of(measured, named["primary"])
    there = [axis for axis, name in enumerate(AXES) if np.isfinite(values[:, axis]).any() and name not in _void(first)]
    values, noise = values[:, there], noise[there]
    marked, wins = undominated(values, noise), beats(values, noise)
    for index, row in enumerate(rows):
        better = np.flatnonzero(wins[:, index])
        best = next((one for one in better if marked[one]), better[0] if len(better) else None)
        row["pareto"] = bool(marked[index])
        row["beaten_by"] = None if marked[index] or best is None else rows[best]["name"]
    return {"rows": rows, "axes": [AXES[axis] for axis in there], "attacks": named, "rule": RULE}


def _void(first: Mapping) -> tuple[str, ...]:
    """Axes that say nothing: where the two files of records differ without any model, so may attacks."""
    return ("leakage",) if (first["privacy"] or {}).get("no_verdict") else ()


def attack_names(first: Mapping) -> dict[str, str | None]:
    """The attack of the leakage axis, and the strongest on the original that needs no other model."""
    areas = {row["name"]: row["auc"] for row in (first["privacy"] or {}).get("attacks", [])}
    alone = strongest_alone(areas)
    return {"primary": PRIMARY if PRIMARY in areas else alone, "alone": alone}


def strongest_alone(areas: Mapping[str, float]) -> str | None:
    """Of attacks by name with their AUC, the one farthest from chance among those that need no reference."""
    known = ATTACKS | JOINT
    rest = {
        name: area
        for name, area in areas.items()
        if name in known and not {"reference", "shadows"} & set(known[name].needs)
    }
    return max(rest, key=lambda name: abs(rest[name] - 0.5), default=None)


# ---- rows


def _row(point: Point, one: Mapping, first: Mapping, named: Mapping[str, str | None]) -> dict:
    """One row: plain numbers, texts and None."""
    public, privacy = one["public"], one["privacy"] or {}
    attacks = {row["name"]: row for row in privacy.get("attacks", [])}
    return {
        "name": point.name,
        "family": point.family,
        "recipe": dict(point.recipe),
        "change": point.change and asdict(point.change) | {"words": point.change.words},
        "quantized": point.quantize,
        "needs": list(point.needs),
        "model": point.model,
        "bits": one["bits"],
        "levers": {"anchor": point.recipe.get("anchor"), "noise": _noise(point)},
        "guarantee": one["guarantee"],
        "public": {key: public[key] for key in ("perplexity", "nll", "se", "tokens")}
        | {"delta": paired(first["public"]["windows"], public["windows"])},
        "domain": _domain(one, first),
        "tasks": [_task(now, before) for now, before in zip(one["tasks"], first["tasks"], strict=True)],
        "primary": _attack(attacks.get(named["primary"])),
        "alone": _attack(attacks.get(named["alone"])),
        "extraction": _extraction(privacy),
        "exposure": _exposure(privacy),
        "warnings": list(one["warnings"]),
        "seconds": one["seconds"],
    }


def _noise(point: Point) -> float | None:
    return point.change.amount if point.change and point.change.kind == "noise" else point.recipe.get("noise")


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Mean increase and its paired standard error."""
    change = np.asarray(after, float) - np.asarray(before, float)
    error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else 0.0
    return {"value": float(change.mean()), "se": float(error)}


def _domain(one: Mapping, first: Mapping) -> dict | None:
    """Mean loss over unseen records, each record counting once."""
    if not one["domain"]:
        return None
    losses = np.asarray(one["domain"], float)
    error = losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    return {
        "nll": float(losses.mean()),
        "se": float(error),
        "records": len(losses),
        "delta": paired(first["domain"], losses),
    }


def _task(now: Mapping, before: Mapping) -> dict:
    return {
        **{key: now[key] for key in ("name", "accuracy", "se", "items")},
        "delta": paired(before["correct"], now["correct"]),
    }


def _attack(row: Mapping | None) -> dict | None:
    """AUC with its interval, how far it is from chance on either side, and the rate at the least FPR that exists."""
    if row is None:
        return None
    rates = row["tpr_at_fpr"]
    rate = next((key for key in ("0.01", "0.1") if (rates.get(key) or {}).get("tpr") is not None), None)
    return {
        "name": row["name"],
        "auc": row["auc"],
        "ci": row["ci"],
        "two_sided": abs(row["auc"] - 0.5),
        "tpr": rate and {"fpr": float(rate), "value": rates[rate]["tpr"], "ci": rates[rate]["ci"]},
    }


def _extraction(privacy: Mapping) -> dict | None:
    row = next((row for row in privacy.get("extraction", []) if row["kind"] == "all"), None)
    names = ("extracted", "spans", "rate", "ci", "control_extracted", "control_spans")
    return row and {name: row[name] for name in names}


def _exposure(privacy: Mapping) -> dict | None:
    row = next(iter(privacy.get("exposure", [])), None)
    bits = row and [canary["bits"] for canary in row["canaries"]]
    return row and exposure_row(bits, row["limit_bits"], privacy.get("exposure_control"))


def exposure_row(bits: Sequence[float], limit: float, control: float | None) -> dict:
    """Mean over the planted canaries and its standard error; control: the mean of those that were left out."""
    values = np.asarray(bits, float)
    return {
        "canaries": len(values),
        "mean": float(values.mean()),
        "se": float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
        "limit": limit,
        "control": control,
    }


# ---- what beats what


def values_of(rows: Sequence[Mapping]) -> np.ndarray:
    """(points, axes); NaN where nothing was measured."""
    read: tuple[Callable[[Mapping], float | None], ...] = (
        lambda row: row["bits"]["all_in"],
        lambda row: row["public"]["nll"],
        lambda row: row["domain"] and row["domain"]["nll"],
        lambda row: row["primary"] and row["primary"]["two_sided"],
    )
    return np.array([[np.nan if (value := of(row)) is None else value for of in read] for row in rows], float)


def noise_of(measured: Sequence[Mapping], attack: str | None) -> np.ndarray:
    """(axes, points, points): how far two points may differ on an axis and still not be told apart."""
    count = len(measured)
    noise = np.zeros((len(AXES), count, count))
    noise[0] = SIZE
    sides = [outward(one["scores"].get(attack)) for one in measured]
    for i in range(count):
        for j in range(i):
            a, b = measured[i], measured[j]
            noise[1, i, j] = Z * paired(a["public"]["windows"], b["public"]["windows"])["se"]
            if a["domain"] and b["domain"]:
                noise[2, i, j] = Z * paired(a["domain"], b["domain"])["se"]
            if sides[i] is not None and sides[j] is not None:
                change = paired_difference(sides[i], sides[j])
                noise[3, i, j] = max(change.value - change.ci[0], change.ci[1] - change.value)
    return np.maximum(noise, noise.transpose(0, 2, 1))


def outward(sides: Sequence[Sequence[float | None]] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of both sides, turned so that their AUC is 0.5 or more: what a two-sided attacker would use."""
    if sides is None:
        return None
    inside, outside = (np.array([-np.inf if value is None else value for value in side], float) for side in sides)
    return (inside, outside) if auc(inside, outside) >= 0.5 else (-inside, -outside)

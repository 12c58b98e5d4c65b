"""What an identification found, in sentences that are computed from its numbers and say no more than they do."""

from __future__ import annotations

from collections import Counter

import numpy as np

from geoquant.outliers.compared import sentences as compared_sentences
from geoquant.outliers.leaderboard import leaderboard
from geoquant.outliers.taxonomy import BOTH, FUNCTIONAL, LEVEL, NEITHER, SENSITIVE

__all__ = ["PLURAL", "findings", "named"]

PLURAL = {"site": "layers", "half": "halves of blocks", "block": "blocks"}
FEWEST = 8  # groups, for a rank correlation


def named(groups: str) -> str:
    """What the groups of a grouping are called."""
    return "stretches of depth" if groups.startswith("depth:") else PLURAL.get(groups, "groups of columns")


def findings(report: dict) -> list[str]:
    """The sentences of identity.json, from the rest of it."""
    groups = named(report["groups"])
    told = []
    for do in report["settings"]["do"]:
        rows = [row for row in report["rows"] if row["intervention"] == do]
        told.append(_counts(do, rows, groups))
        told.append(_largest(do, rows))
        told += _privacy(do, rows)
        told += [_control(one) for one in report["controls"] if one["intervention"] == do]
    told.append(_power(report["tests"]))
    told += [_agreed(one) for one in report["agreement"] if _told(one)]
    told += compared_sentences(report.get("compared", []))
    told += [f"Geometry and {one['intervention']}: {one['sentence']}." for one in report["verdicts"] if one["asked"]]
    why = {one["sentence"] for one in report["verdicts"] if not one["asked"]}
    told += [f"No verdict on geometric separability: {sentence}." for sentence in sorted(why)]
    return told


def _counts(do: str, rows: list[dict], groups: str) -> str:
    """How many of each label; of tops and controls apart."""
    parts = []
    for role in dict.fromkeys(row["role"] for row in rows):
        own = [row for row in rows if row["role"] == role]
        count = Counter(row["label"] for row in own)
        told = ", ".join(f"{count[name]} {name}" for name in (FUNCTIONAL, SENSITIVE, BOTH, NEITHER))
        parts.append(f"of {len(own)} {groups}{f' ({role})' if role else ''} {told}")
    return f"{do}: {'; '.join(parts)}."


def _largest(do: str, rows: list[dict]) -> str:
    row = max(rows, key=_rise)
    if row["effect"]["public"]["value"] is None:
        count = sum(one["effect"]["public"]["value"] is None for one in rows)
        return f"{do}: {count} groups leave no model at all (NaN), the first of them {row['group']}."
    if _rise(row) <= 0:
        row = min(rows, key=_rise)
        return f"{do}: public NLL rises with no group; it falls most with {row['group']}, by {_nats(row, -1)} nats."
    return (
        f"{do}: public NLL rises most with {row['group']}, by {_nats(row, 1)} nats; functional begins at "
        f"{row['threshold']:.3g}."
    )


def _nats(row: dict, sign: int) -> str:
    public = row["effect"]["public"]
    return f"{sign * public['value']:.3g}" + ("" if public["se"] is None else f" (standard error {public['se']:.2g})")


def _rise(row: dict) -> float:
    value = row["effect"]["public"]["value"]
    return np.inf if value is None else value


def _privacy(do: str, rows: list[dict]) -> list[str]:
    """The surest fall, the gap, and whether privacy falls merely where the model is damaged."""
    asked = [row for row in rows if row["by"] is not None]
    if not asked:
        return []
    row = min(asked, key=lambda row: row["p_holm"])
    surest = f"that of {_measure(row['by'])} with {row['group']}, p = {row['p_holm']:.2g}"
    if row["p_holm"] <= LEVEL:
        told = [f"{do}: the surest fall of a measure of privacy is {surest}."]
    elif row["p_holm"] < 1:
        told = [f"{do}: no measure of privacy falls beyond chance; nearest to it comes {surest}."]
    else:
        told = [f"{do}: no measure of privacy falls beyond chance, nor nearly so (p = 1 with every group)."]
    gaps = [row for row in rows if row["gap_p_holm"] is not None]
    if not gaps:
        return told
    least = min(gaps, key=lambda row: row["effect"]["gap"]["value"])
    gap, sure = least["effect"]["gap"], sum(row["gap_p_holm"] <= LEVEL for row in gaps)
    most = "" if gap["value"] >= 0 else f", most with {least['group']}: {gap['before']:.3g} to {gap['after']:.3g} nats"
    told.append(
        f"{do}: the gap between members' and others' losses surely shrinks with {sure} of {len(gaps)} groups{most} "
        f"(standard error {gap['se']:.2g}). It decides no label."
    )
    known = [row for row in gaps if row["effect"]["public"]["value"] is not None]
    if len(known) >= FEWEST:
        rises = np.array([row["effect"]["public"]["value"] for row in known])
        shrinks = np.array([-row["effect"]["gap"]["value"] for row in known])
        one = leaderboard({"rise": rises}, shrinks)[0]
        if np.isfinite(one.rho):
            means = f"mere damage {'may be part of it' if one.rho > 0 else 'is not what shrinks it'}"
            if one.p >= LEVEL or one.ci[0] <= 0 <= one.ci[1]:
                means = "no relation is sure"
            told.append(
                f"{do}: where public NLL rises more the gap shrinks {'more' if one.rho > 0 else 'less'}: rank "
                f"correlation {one.rho:+.2f} ({one.ci[0]:+.2f} to {one.ci[1]:+.2f}); {means}."
            )
    return told


def _measure(by: str) -> str:
    return by if by in ("exposure", "extraction") else f"the advantage of the {by} attack"


def _control(one: dict) -> str:
    what = "public NLL rises" if one["measure"] == "public" else "the gap shrinks"
    low, high = one["ci"] or (np.nan, np.nan)
    return (
        f"{one['intervention']}, top against random columns: {what} by {one['top']:.3g} against {one['random']:.3g} "
        f"nats, on average {one['value']:+.3g} more ({low:+.3g} to {high:+.3g}); more at {one['larger']} of "
        f"{one['sites']} layers (p = {one['p']:.2g})."
    )


def _power(tests: dict) -> str:
    if not tests["count"]:
        return "No private records were given, so that nothing could be found sensitive."
    fall = ""
    if tests["precision"] is not None:
        errors = ", ".join(f"{error:.2g} of the {name} attack" for name, error in tests["precision"]["median"].items())
        fall = f", so that one fall alone counts from {tests['precision']['errors']:.1f} standard errors on"
        fall += f" (half of the changes of advantage have less than: {errors})" if errors else ""
    return (
        f"Neither is no proof of absence: {tests['count']} tests of privacy share a level of "
        f"{100 * tests['level']:g}%{fall}."
    )


def _told(one: dict) -> bool:
    """Sentences for whole labels between interventions and halves, and for what is sensitive otherwise."""
    if one["what"] == "measures":
        return {one["first"], one["second"]} == {"loss", "reference"}
    return one["of"] == "label"


def _agreed(one: dict) -> str:
    who = {
        "interventions": f"{one['first']} and {one['second']} give",
        "measures": f"{one['intervention']}: the {one['first']} and the {one['second']} attack alone find",
        "halves": f"{one['intervention']}: two halves of the data give",
    }[one["what"]]
    what = "the same sensitivity to" if one["of"] == "sensitive" else "the same label to"
    if one["what"] == "measures":
        what = "the same groups sensitive or not:"
        told = f"{who} {what} {round(one['same'] * one['count'])} of {one['count']}"
    else:
        told = f"{who} {what} {round(one['same'] * one['count'])} of {one['count']} groups"
    if one["value"] is None:
        return f"{told}; all alike, so that chance would agree as well."
    low, high = one["ci"]
    if low == high == 0:
        return f"{told}; one of them tells no groups apart, so that kappa is 0."
    return f"{told}, kappa {one['value']:+.2f} ({low:+.2f} to {high:+.2f}; chance: 0)."

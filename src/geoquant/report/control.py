"""What levers did to the weights, in sentences: for the page and for the last lines of a run."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

__all__ = ["control_sentences", "moved_rows"]

UNLIKE = 0.2  # of |AUC - 1/2|: beyond what few records show by chance
PLACES = {"embed_tokens": "embeddings", "lm_head": "head", "norm": "final norm"}


def control_sentences(report: Mapping) -> list[str]:
    """Of a plan, the anchor, forgetting and refinement; nothing where no lever was used. A guarantee has own words."""
    told = []
    protection, refinement, plan = (report.get(name) for name in ("protection", "refinement", "plan"))
    if plan:
        told += _rates(plan)
    if protection and protection["lever"] == "plan":
        told += _shares(protection)
    if protection and protection["lever"] == "anchor":
        told += _anchor(protection)
    if protection and protection.get("forgot"):
        told += _forgot(protection["forgot"])
    if refinement:
        told.append(f"Refinement moved {refinement['moved']:.1%} of the codes by one step.")
        told += [_blocks(blocks)] if (blocks := refinement.get("blocks")) else []
        told += [_rows(geometry["classes"])] if (geometry := refinement.get("geometry")) else []
    if told and not (report["privacy"] or {}).get("guarantee"):
        told.append(_no_guarantee(protection or {}, plan or {}))
    return told


def _blocks(blocks: Mapping) -> str:
    """What the pass over each block alone won, and whether it was of use."""
    before, after = (median(one[side]["total"] for one in blocks["errors"]) for side in ("before", "after"))
    where = "from there" if blocks["kept"] else "from the solver's codes, whose objective was lower"
    return (
        f"Block by block, errors of outputs fell from {before:.3g} to {after:.3g} (medians); refinement began {where}."
    )


def _rows(classes: Mapping) -> str:
    """How many rows lay above their threshold of distortion."""
    above, count = [], 0
    for side in ("before", "after"):
        count = sum(one["rows"] for one in classes[side].values())
        above.append(sum(one["above"] * one["rows"] for one in classes[side].values()) / max(1, count))
    return f"Of {count} rows {above[0]:.1%} lay above their threshold of distortion, {above[1]:.1%} afterwards."


def _no_guarantee(protection: Mapping, plan: Mapping) -> str:
    """And what of the result was computed from private records, and shows."""
    if plan.get("looked"):
        where = "rates" + (" and shares were" if plan["anchors"] else " were")
        shown = ", and whoever has the base sees which weights went back" if plan["anchors"] else ""
        return f"No formal guarantee: {where} computed from private data and show in the file{shown}."
    if protection.get("taught"):
        return (
            "No formal guarantee: which weights were changed was computed from private data, and whoever has the base "
            "sees which they are."
        )
    if protection.get("aim") == "metric":
        return (
            "No formal guarantee: where layers went back was computed from private data, and whoever has the base sees "
            "how far they did."
        )
    if protection.get("forgot"):
        return "No formal guarantee: how the weights moved was computed from private data."
    return "No formal guarantee."


def _forgot(forgot: Mapping) -> list[str]:
    before, after, count = forgot["before"], forgot["after"], forgot["sequences"]["private"]
    gaps = [known["level_gap"] - known["private_gap"] for known in (before, after)]
    if not forgot["made"]:
        less = gaps[0] < 0 and before["attack"] > UNLIKE
        asked = " They are even less known than others: are --private and --domain exchanged?" if less else ""
        return [f"None of {count} private records was better known than others of its kind: nothing moved.{asked}"]
    passes = "1 pass" if forgot["made"] == 1 else f"{forgot['made']} passes"
    return [
        f"{passes} over {count} private records pulled those that the model knew better than others of their kind, "
        f"if any, towards the level of these: their mean loss, less the base's, {_below(gaps[0])} the others' before "
        f"and {_below(gaps[1])} it after; the reference attack between the two, on these very records and before "
        f"rounding, was {before['attack']:.2f} from chance and is {after['attack']:.2f}. On the text and the records "
        f"that it was held to, the model diverged by {forgot['divergence']:.3f} nats per token in the last pass; the "
        "length of the change since the base went from "
        f"{forgot['distance']['before']:.4g} to {forgot['distance']['after']:.4g}."
    ]


def _below(gap: float) -> str:
    return f"was {abs(gap):.2f} nats per token {'below' if gap >= 0 else 'above'}"


def _rates(plan: Mapping) -> list[str]:
    rates, size = sorted({stage["planned"] for stage in plan["stages"]}), plan["bytes"]
    span = f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else f"{rates[0]:g}"
    told = [
        f"A plan chose the rate of each of {len(plan['stages'])} stages, {span} bits per weight: "
        f"{size['got'] / 1e6:,.4g} MB, planned {size['planned'] / 1e6:,.4g} MB."
    ]
    if not plan["anchors"]:
        told.append("It put no weight back to the public base.")
    return told


def _shares(protection: Mapping) -> list[str]:
    before, after = protection["distance"]["before"], protection["distance"]["after"]
    parts = [
        f"{count:.1%} of the weights {'all' if share == 1 else 'none' if share == 0 else f'{share:.0%}'}"
        for share, count in sorted(protection["weights"], reverse=True)
    ]
    return [
        f"Of their change since the public base keep, as planned: {', '.join(parts)}. The length of the change fell "
        f"from {before:.4g} to {after:.4g}."
    ]


def _anchor(protection: Mapping) -> list[str]:
    before, after = protection["distance"]["before"], protection["distance"]["after"]
    if protection["aim"] == "everything":
        return [
            f"Every weight went {protection['anchor']:.0%} of the way back to the public base: the length of the "
            f"change since the base fell from {before:.4g} to {after:.4g}."
        ]
    if protection["aim"] == "metric":
        return _combined(protection)
    taught = protection["taught"]
    parts = ", ".join(
        f"{own['put_back']:+.2f} of {own['all']:+.2f} on {text}"
        for text, own in ((text, taught[text]) for text in ("private", "domain", "public"))
    )
    return [
        "Groups of weights went back to the public base where what their change taught of private records, times "
        f"{protection['anchor']:g}, was more than what it taught of others of their kind and of public text; the "
        f"length of the change since the base fell from {before:.4g} to {after:.4g}.",
        f"Nats per token that the fine-tune had gained through the groups that went back: {parts} text (first order "
        "along the way from the base; below zero it had lost there).",
    ]


def _combined(protection: Mapping) -> list[str]:
    before, after = protection["distance"]["before"], protection["distance"]["after"]
    share, kept = protection["anchor"], protection["kept"]
    told = [
        f"Layers went back to the public base while they were solved, each for one target: the outputs of the "
        f"fine-tune on public and domain text with a weight of {1 - share:.0%}, those of the base on private records "
        f"with one of {share:.0%}. What is no layer went {share:.0%} of the way. The length of the change since the "
        f"base fell from {before:.4g} to {after:.4g}."
    ]
    if kept["layers"]:
        told.append(
            f"As inputs of private records see it, the change of a layer kept {kept['private']:.0%} of its length, as "
            f"the others do {kept['function']:.0%}; interpolation would have kept {1 - share:.0%} of both."
        )
    if kept["unchanged"]:
        told.append(f"{kept['unchanged']} layers had not changed since the base.")
    if kept["by_share"]:
        told.append(f"{kept['by_share']} layers that not every token reaches went {share:.0%} of the way.")
    return told


def moved_rows(report: Mapping) -> list[tuple[str, float]]:
    """Share of each kind of weight that was moved, the most first."""
    moved = (report.get("protection") or {}).get("moved") or {}
    return sorted(((PLACES.get(name, name), share) for name, share in moved.items()), key=lambda row: -row[1])

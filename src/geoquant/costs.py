"""What levers cost: seconds beyond plain quantization of the same size, from the timings of the runs of a frontier.

Counted is what makes the model: reading it, levers before and after solving, solving. What measures, audits, exports
and verifies is the same for all points and left out. A measurement that a point found finished (protecting.py) is
counted in, as if it had been made there: alone the point would have had to. Seconds are of the wall clock, on the
machine as it was; of a run that was interrupted nobody knows them.

    seconds     of the run
    extra       beyond those of `plain`, the point that differs in levers alone: levers and rest add up to it
    levers      by lever its own part
    rest        reading and solving another model than `plain` did
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from geoquant.plan.points import Point
from geoquant.recipe import checked

__all__ = ["CHANGE", "cost_sentence", "costs"]

CHANGE = "change the weights"  # the phase of a point's own, before its run
SOLVING = ("load", "quantize")
LEVERS = {
    *("base", "private", "domain", "anchor", "aim", "forget", "forget_weight"),
    *("refine", "refine_privacy", "refine_blocks", "refine_geometry", "refine_threshold", "refine_lowered", "keep"),
    *("epsilon", "delta", "radius", "ball", "shards", "clip", "inherited"),
}
SHAPED = {
    "klein": "klein",
    "lattice-klein": "klein",
    "dqc": "keep",
}  # methods that are levers, and what they are called


def costs(points: Sequence[Point], measured: Sequence[Mapping]) -> list[dict | None]:
    """One entry a point; None for what was not quantized here, or not in one go. measured: as for the matrix."""
    spent = [_spent(point, one) for point, one in zip(points, measured, strict=True)]
    plain = {}
    for index, point in enumerate(points):
        if spent[index] is not None and point.change is None and _same(point.recipe) == _same(_bare(point.recipe)):
            plain.setdefault(_same(point.recipe), index)
    return [
        None if own is None else _cost(point, own, points, spent, plain.get(_same(_bare(point.recipe))))
        for point, own in zip(points, spent, strict=True)
    ]


def _spent(point: Point, one: Mapping) -> dict[str, float] | None:
    """Seconds by phase."""
    timings = one.get("timings")
    if not point.quantize or point.model is not None or not timings or one.get("resumed"):
        return None
    found = {name: float(timings.get(name, 0.0)) for name in (*SOLVING, "protect", "refine", CHANGE)}
    found["protect"] += one.get("borrowed") or 0.0
    return found


def _cost(point: Point, own: Mapping, points: Sequence[Point], spent: Sequence[Mapping], plain: int | None) -> dict:
    recipe = point.recipe
    levers = {
        _protecting(recipe): own["protect"],
        "refine": own["refine"],
        point.change.kind if point.change else "change": own[CHANGE],
    }
    levers = {name: seconds for name, seconds in levers.items() if seconds > 0}
    total = sum(own.values())
    told = {"seconds": total, "plain": None, "plain_seconds": None, "extra": None, "levers": levers, "rest": None}
    if plain is None:
        return told
    theirs = spent[plain]
    rest = sum(own[name] - theirs[name] for name in SOLVING)
    # Levers that act while layers are solved are all that these runs took longer for.
    shape = SHAPED.get(recipe.get("method")) or ("keep" if recipe.get("keep") else None)
    if shape or recipe.get("aim") == "metric":
        shape = shape or "anchor"
        levers[shape], rest = levers.get(shape, 0.0) + rest, 0.0
    before = sum(theirs.values())
    return told | {"plain": points[plain].name, "plain_seconds": before, "extra": total - before, "rest": rest}


def _protecting(recipe: Mapping) -> str:
    """What made another model of the given one."""
    if recipe.get("epsilon"):
        return "release"
    return " and ".join(name for name in ("anchor", "forget") if recipe.get(name)) or "anchor"


def _bare(recipe: Mapping) -> dict:
    """What is left of a point's options without its levers."""
    kept = {name: value for name, value in recipe.items() if name not in LEVERS}
    if kept.get("method") in SHAPED:
        kept = {name: value for name, value in kept.items() if name not in ("method", "row_block")}
    return kept


def _same(recipe: Mapping) -> str:
    """The same for options that say the same: defaults may be named or not."""
    return json.dumps(checked({"model": "model", **recipe}).model_dump(mode="json"), sort_keys=True)


def cost_sentence(rows: Sequence[Mapping]) -> str | None:
    """What every lever cost, over the rows that have a plain one to be compared with; None where there are none."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cost in (row["cost"] for row in rows):
        if cost and cost["plain"] is not None:
            for name, seconds in cost["levers"].items():
                found.setdefault(name, []).append((seconds, seconds / cost["plain_seconds"]))
    if not found:
        return None
    parts = []
    for name, pairs in found.items():
        seconds, shares = (_range(values) for values in zip(*pairs, strict=True))
        parts.append(f"{name} {seconds('{:.3g}')} s ({shares('{:.0%}')} of the plain run, {_points(len(pairs))})")
    return (
        f"Cost of levers beyond plain quantization at the same rate: {', '.join(parts)}. Wall clock on the machine as "
        "it was; measuring, auditing and export are not counted."
    )


def _range(values: Sequence[float]):
    """How the least and the largest read in a format."""

    def told(style: str) -> str:
        ends = [style.format(end) for end in (min(values), max(values))]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    return told


def _points(count: int) -> str:
    return "1 point" if count == 1 else f"{count} points"

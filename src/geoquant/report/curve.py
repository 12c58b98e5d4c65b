"""The frontier as a picture: what is lost against what still leaks, a mark per operating point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from geoquant.report.figures import TOP, number, path, percent, picture, plain_number, tag
from geoquant.report.scatter import bent, round_ticks

__all__ = ["SHAPES", "Dot", "Line", "curve_panel", "dots", "family_lines", "mark", "staircase"]

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 440.0, 300.0, 44.0, 10.0, 38.0
BEND = 2.0  # per cent of perplexity: linear up to it, logarithmic beyond, so that one lost model hides no other
# Corners of a family's mark around its centre, in pixels; a family without corners is a circle.
PENTAGON = ((0, -4.8), (4.6, -1.5), (2.8, 4), (-2.8, 4), (-4.6, -1.5))
SHAPES = {
    "rounding": ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
    "interpolation": ((0, -4.6), (4.4, 3.4), (-4.4, 3.4)),
    "noise": ((0, 4.6), (4.4, -3.4), (-4.4, -3.4)),
    "anchor": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    "shape": ((-2, -5), (2, -5), (2, 5), (-2, 5)),
    "guarantee": PENTAGON,
    "dp": PENTAGON,
    "together": ((-5, -2), (5, -2), (5, 2), (-5, 2)),
}


@dataclass(frozen=True)
class Dot:
    """One point: x in per cent of perplexity, y as |AUC - 1/2|, both with their intervals."""

    x: float
    x_interval: tuple[float, float]
    y: float
    y_interval: tuple[float, float]
    family: str
    marked: bool
    tip: str
    here: bool = False


@dataclass(frozen=True)
class Line:
    """A family's line through its points, as places (per cent of perplexity, |AUC - 1/2|); its colour is of `family`.

    dashed: through points of any size; else through those that are no larger than the chosen one.
    """

    places: tuple[tuple[float, float], ...]
    family: str
    dashed: bool


def family_lines(
    rows: Sequence[Mapping], families: Sequence[Mapping], signs: Mapping[str, str], loss: str
) -> list[Line]:
    """The lines of the baselines (of the part `baselines` of frontier.json), straight in nats. signs: whose colour."""
    known = {row["name"]: row for row in rows}
    drawn = []
    for one in families:
        lines = one.get("lines") or {}
        for reach, names in ((reach, lines[reach][loss]) for reach in ("any", "no_larger") if reach in lines):
            dashed = reach == "any"
            if len(names) < 2 or (dashed and names == lines["no_larger"][loss]):
                continue
            ends = [(known[name][loss]["delta"]["value"], known[name]["primary"]["two_sided"]) for name in names]
            drawn.append(Line(tuple((lost(nats), leak) for nats, leak in _between(ends)), signs[one["family"]], dashed))
    return drawn


def _between(ends: Sequence[tuple[float, float]], parts: int = 12) -> list[tuple[float, float]]:
    """Places along straight lines, for an axis on which these are bent."""
    found = [ends[0]]
    for (a, b), (c, d) in pairwise(ends):
        found += [(a + (c - a) * k / parts, b + (d - b) * k / parts) for k in range(1, parts + 1)]
    return found


def dots(rows: Sequence[dict], loss: str, here: str | None = None) -> list[Dot]:
    """Dots of the rows of a frontier. loss: `public` or `domain`; here: the name of a point to point at."""
    found = []
    for row in rows:
        attack, told = row["primary"], row[loss]
        if attack is None or told is None:
            continue
        value, half = told["delta"]["value"], 1.96 * told["delta"]["se"]
        low, high = (abs(bound - 0.5) for bound in attack["ci"])
        across = attack["ci"][0] <= 0.5 <= attack["ci"][1]
        found.append(
            Dot(
                lost(value),
                (lost(value - half), lost(value + half)),
                attack["two_sided"],
                (0.0 if across else min(low, high), max(low, high)),
                row["family"],
                row["pareto"],
                f"{row['name']}: {plain_number(row['bits']['all_in'], 2)} bits, perplexity "
                f"{percent(math.expm1(min(value, 20.0)))} up, AUC {plain_number(attack['auc'], 3)}",
                row["name"] == here,
            )
        )
    return found


def lost(nats: float) -> float:
    """A rise of the loss as a rise of perplexity in per cent; nothing is worse than a million."""
    return min(100 * math.expm1(min(nats, 20.0)), 1e6)


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with no other to their lower left, from left to right."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def mark(family: str, marked: bool, x: float = 6.0, y: float = 6.0, tip: str = "") -> Markup:
    """The sign of a family: full where nothing beats the point, hollow elsewhere."""
    inside = (tag("title", tip),) if tip else ()
    class_ = f"point f-{family}" + ("" if marked else " hollow")
    if (corners := SHAPES.get(family)) is None:
        return tag("circle", *inside, cx=x, cy=y, r=3.6, class_=class_)
    drawn = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return tag("polygon", *inside, points=drawn, class_=class_)


def curve_panel(found: Sequence[Dot], across: str, *, small: bool = False, lines: Sequence[Line] = ()) -> Markup:
    """Leakage against loss with intervals; the line joins the points that have no other to their lower left.

    lines: of families, beneath the points.
    """
    if not found:
        return Markup("")
    width, height = (320.0, 210.0) if small else (WIDTH, HEIGHT)
    w, h = width - LEFT - RIGHT, height - TOP - BOTTOM
    xs = [bent(value, BEND) for dot in found for value in (*dot.x_interval, 0.0, BEND)]
    left, right = min(xs), max(xs)
    top = max(0.1, *(dot.y_interval[1] for dot in found))

    def x(value: float) -> float:
        return LEFT + 4 + (w - 8) * (bent(value, BEND) - left) / ((right - left) or 1)

    def y(value: float) -> float:
        return TOP + h * (1 - value / top)

    parts = []
    for value in round_ticks(0.0, top):
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", plain_number(value, 2), x=LEFT - 5, y=y(value) + 3.5, class_="tick end"))
    for value in (-100.0, -10.0, 0.0, 2.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6):
        if left - 1e-9 <= bent(value, BEND) <= right + 1e-9:
            parts.append(tag("line", x1=x(value), x2=x(value), y1=TOP, y2=TOP + h, class_="grid"))
            label = f"{number(value, 1, sign=True)}%" if value else "0"
            parts.append(tag("text", label, x=x(value), y=TOP + h + 13, class_="tick middle"))
    parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(0), y2=y(0), class_="axis"))
    line = staircase([(dot.x, dot.y) for dot in found])
    for one in lines:
        class_ = f"family f-{one.family}" + (" dashed" if one.dashed else "")
        parts.append(path([(x(a), y(b)) for a, b in one.places], class_))
    parts.append(path([(x(a), y(b)) for a, b in line], "pareto"))
    for dot in sorted(found, key=lambda dot: dot.marked):
        ends, rise = [x(value) for value in dot.x_interval], [y(value) for value in dot.y_interval]
        lines = (
            tag("line", x1=ends[0], x2=ends[1], y1=y(dot.y), y2=y(dot.y), class_="thin"),
            tag("line", x1=x(dot.x), x2=x(dot.x), y1=rise[0], y2=rise[1], class_="thin"),
        )
        drawn = mark(dot.family, dot.marked, x(dot.x), y(dot.y), dot.tip)
        if dot.here:
            drawn += tag("circle", cx=x(dot.x), cy=y(dot.y), r=8.5, class_="here")
        parts.append(tag("g", *lines, drawn, class_=f"f-{dot.family}"))
    parts.append(tag("text", across, x=LEFT + w / 2, y=height - 5, class_="axis-name middle"))
    best = sum(dot.marked for dot in found)
    label = f"leakage |AUC - 0.5| against {across}, {len(found)} points, {best} beaten by none"
    return picture(width, height, label, *parts, class_="natural" if small else "panel")

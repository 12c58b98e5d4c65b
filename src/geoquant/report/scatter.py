"""What interventions do to function against what they do to privacy: a point per group, with its intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from geoquant.report.figures import LEFT, RIGHT, TOP, WIDTH, number, picture, plain_number, tag

__all__ = ["Point", "bent", "effect_panel", "round_ticks"]


@dataclass(frozen=True)
class Point:
    """One group: x and y with their intervals, its label, and what a mouse over it says."""

    x: float
    x_interval: tuple[float, float]
    y: float
    y_interval: tuple[float, float]
    label: str
    tip: str


def effect_panel(points: Sequence[Point], *, threshold: float, across: str, up: str) -> Markup:
    """x is linear up to the threshold (dashed) and logarithmic beyond, so that one lost group hides no other."""
    if not points:
        return Markup("")
    height, bottom = 224.0, 36.0
    w, h = WIDTH - LEFT - RIGHT, height - TOP - bottom

    xs = [bent(value, threshold) for point in points for value in (*point.x_interval, 0.0, threshold)]
    ys = [value for point in points for value in (*point.y_interval, 0.0)]
    (left, right), (low, high) = ((min(values), max(values)) for values in (xs, ys))

    def x(value: float) -> float:
        return LEFT + w * (bent(value, threshold) - left) / ((right - left) or 1)

    def y(value: float) -> float:
        return TOP + h * (1 - (value - low) / ((high - low) or 1))

    parts = []
    for value in round_ticks(low, high):
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", plain_number(value, 2), x=LEFT - 5, y=y(value) + 3.5, class_="tick end"))
    decades = [10.0**k for k in range(math.ceil(math.log10(threshold)), 3)]
    for value in (0.0, *decades, *(-one for one in decades)):
        if left - 1e-9 <= bent(value, threshold) <= right + 1e-9:
            parts.append(tag("line", x1=x(value), x2=x(value), y1=TOP, y2=TOP + h, class_="grid"))
            parts.append(tag("text", number(value), x=x(value), y=TOP + h + 13, class_="tick middle"))
    parts.append(tag("line", x1=x(threshold), x2=x(threshold), y1=TOP, y2=TOP + h, class_="reference"))
    parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(0), y2=y(0), class_="axis"))
    for point in points:
        kind = f"l-{point.label}"
        ends, rise = [x(value) for value in point.x_interval], [y(value) for value in point.y_interval]
        lines = (
            tag("line", x1=ends[0], x2=ends[1], y1=y(point.y), y2=y(point.y), class_="thin"),
            tag("line", x1=x(point.x), x2=x(point.x), y1=rise[0], y2=rise[1], class_="thin"),
        )
        dot = tag("circle", tag("title", point.tip), cx=x(point.x), cy=y(point.y), r=3.2)
        parts.append(tag("g", *lines, dot, class_=f"effect {kind}"))
    parts.append(tag("text", across, x=LEFT + w / 2, y=height - 4, class_="axis-name middle"))
    label = f"{up} against {across}, {len(points)} groups; dashed: where functional begins"
    return picture(WIDTH, height, label, *parts, class_="panel")


def bent(value: float, threshold: float) -> float:
    """Linear around zero, logarithmic beyond the threshold on either side."""
    return math.copysign(math.log10(1 + abs(value) / threshold), value)


def round_ticks(low: float, high: float) -> list[float]:
    """About four round values within [low, high]."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next((m for m in (1, 2, 5, 10) if span / (m * step) <= 5), 10)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

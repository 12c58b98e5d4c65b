"""Figures of where outliers come from: attention on the sink, the residual stream, clipping against rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from geoquant.report.figures import LEFT, RIGHT, TOP, WIDTH, number, path, percent, picture, tag, ticks_log

__all__ = ["clip_panel", "residual_panel", "sink_map"]

CELL = 13.0


def sink_map(mass: Sequence[Sequence[float] | None]) -> Markup:
    """Blocks down, heads across: the share of a head's attention that rests on the sink, darker for more."""
    heads = max((len(row) for row in mass if row), default=0)
    if not heads:
        return Markup("")
    parts = []
    for block, row in enumerate(mass):
        y = TOP + CELL * block
        if block % 5 == 0 or block == len(mass) - 1:
            parts.append(tag("text", str(block), x=LEFT - 6, y=y + CELL - 3, class_="tick end"))
        for head, share in enumerate(row or ()):
            tip = tag("title", f"block {block}, head {head}: {percent(share)}")
            x, size = LEFT + CELL * head, CELL - 1
            parts.append(tag("rect", x=x, y=y, width=size, height=size, class_="track"))
            shade = f"{min(max(share, 0.0), 1.0):.3f}"
            parts.append(
                tag("rect", tip, x=x, y=y, width=size, height=size, class_="fill s-quantized", fill_opacity=shade)
            )
    most = max((max(row), block) for block, row in enumerate(mass) if row)
    label = f"Attention on the sink by block and head: at most {percent(most[0])}, in block {most[1]}"
    return picture(LEFT + CELL * heads + RIGHT, TOP + CELL * len(mass) + 4, label, *parts, class_="natural")


def residual_panel(largest: Sequence[float], typical: Sequence[float], gaussian: float) -> Markup:
    """The largest value of the residual stream over its median, before each block and after the last; dashed: normal
    numbers.
    """
    ratios = [peak / max(middle, 1e-30) for peak, middle in zip(largest, typical, strict=True)]
    return _lines(
        [("series e-error", list(enumerate(ratios)))],
        reference=gaussian,
        label=f"Largest over median value of the residual stream: {number(min(ratios))} to {number(max(ratios))}",
        across="boundary before block",
    )


def clip_panel(curve: dict) -> Markup:
    """Error of one scale by its clip: what is cut off, what is rounded, and both."""
    both = [cut + rounded for cut, rounded in zip(curve["clipped"], curve["rounded"], strict=True)]
    series = (("series e-heldout", curve["clipped"]), ("series e-expected", curve["rounded"]), ("series e-error", both))
    lines = [(name, list(zip(curve["clip"], values, strict=True))) for name, values in series]
    return _lines(
        lines, reference=None, label=f"Clip and round error of {curve['site']}", across="clip, of the largest"
    )


def _lines(
    lines: Sequence[tuple[str, list[tuple[float, float]]]], *, reference: float | None, label: str, across: str
) -> Markup:
    """Curves over a logarithmic axis; values that are not positive are left out."""
    height, bottom = 190.0, 32.0
    w, h = WIDTH - LEFT - RIGHT, height - TOP - bottom
    known = [(x, y) for _, points in lines for x, y in points if y > 0]
    if not known:
        return Markup("")
    xs, ys = [x for x, _ in known], [y for _, y in known] + ([reference] if reference else [])
    low, high = math.log10(max(min(ys), max(ys) * 1e-8)), math.log10(max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (min(max(math.log10(y), low), high) - low) / ((high - low) or 1)
        return LEFT + w * across, TOP + h * (1 - up)

    parts = []
    for value in ticks_log(10**low, 10**high, most=5):
        y = at(min(xs), value)[1]
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", number(value, 2), x=LEFT - 5, y=y + 3.5, class_="tick end"))
    if reference:
        y = at(min(xs), reference)[1]
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y, y2=y, class_="reference"))
    parts += [path([at(x, y) for x, y in points if y > 0], name) for name, points in lines]
    for x in (min(xs), max(xs)):
        parts.append(tag("text", f"{x:g}", x=at(x, 10**low)[0], y=TOP + h + 14, class_="tick middle"))
    parts.append(tag("text", across, x=LEFT + w / 2, y=height - 3, class_="axis-name middle"))
    return picture(WIDTH, height, label, *parts, class_="natural")

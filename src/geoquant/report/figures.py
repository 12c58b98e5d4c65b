"""How numbers look: as text (`number`, `percent`, `size`...) and as inline SVG that follows light and dark.

Every figure is a pure function from numbers to `Markup`. Colours live in `style.css` under the class names
used here, never in attributes, so that one drawing serves screen, dark screen and paper; lines differ in dash
as well as in colour. Every text that reaches a figure is escaped by `tag`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup, escape

__all__ = [
    "Curve",
    "LayerPoint",
    "cell_axis",
    "change",
    "change_error",
    "dot_interval",
    "layer_panel",
    "level_bar",
    "number",
    "percent",
    "plain_number",
    "roc_panel",
    "size",
    "spread",
    "stacked_bar",
    "ticks_log",
]

NONE = "–"
WIDTH, LEFT, RIGHT, TOP = 280.0, 38.0, 6.0, 8.0


# --- numbers as text ---


def plain_number(value: float | None, digits: int) -> str:
    """Fixed decimals with a real minus sign and thousands separators; an en dash for a missing value."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}f}".replace("-", "−")


def number(value: float | None, digits: int = 3, *, sign: bool = False, most: int | None = None) -> str:
    """`digits` significant digits, all of the integer part: 27.4, 0.0683, 1,580; tiny ones as 3.1e−5.

    With `most`, tiny ones end after that many decimals instead: 0.0001, 0.0000.
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    # Rounded first, so that 0.9996 counts as 1.00 and not as 1.000.
    exponent = int(f"{abs(value):.{digits - 1}e}".split("e")[1])
    decimals = max(digits - 1 - exponent, 0)
    if most is not None:
        decimals = min(decimals, most)
        value = round(value, decimals) or 0.0  # no minus before what is shown as zero
        text = f"{value:,.{decimals}f}"
    elif exponent < -4:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-")
    else:
        text = f"{value:,.{decimals}f}"
    return ("+" if sign and value > 0 else "") + text.replace("-", "−")


def change(value: float | None, digits: int = 3, se: float | None = None) -> str:
    """A difference, signed, as people compare it: +0.0683, −0.0001, 0.0000; finer where `se` is."""
    return number(value, digits, sign=True, most=_decimals(se))


def change_error(se: float | None) -> str:
    """The standard error of a `change`, with as many decimals."""
    return number(se, 2, most=_decimals(se))


def _decimals(se: float | None) -> int:
    """Four; where the standard error would vanish with that, as many as show its first digit."""
    return max(4, min(math.ceil(-math.log10(se)), 8)) if se and math.isfinite(se) else 4


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage: 0.179 -> 17.9%. Shares too small for the digits keep one significant digit."""
    if value is None or not math.isfinite(value):
        return NONE
    scaled = 100 * value
    if 0 < abs(scaled) < 10**-digits:
        return f"{number(scaled, 1)}%"
    return f"{plain_number(scaled, digits)}%"


def spread(bounds: Sequence[float | None] | None, digits: int = 3, *, share: bool = False) -> str:
    """An interval: `0.966 to 0.992`, or `12.1% to 20.4%` when `share`."""
    if not bounds or len(bounds) != 2 or None in bounds:
        return NONE
    low, high = (percent(bound) if share else plain_number(bound, digits) for bound in bounds)
    return f"{low} to {high}"


def size(count: float | None) -> str:
    """Bytes in decimal units with three significant digits: 102 MB."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


# --- SVG ---


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """One SVG element: `class_` means class, other `_` become `-`, all values are escaped."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}".removesuffix(".0")
        parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"')
    inside = "".join(escape(child) for child in children)
    return Markup("".join(parts) + (f">{inside}</{name}>" if inside else "/>"))


def picture(width: float, height: float, label: str, *children: object, class_: str) -> Markup:
    """The svg element with its accessible name."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        class_=class_,
    )


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A polyline at a tenth of a pixel; repeated points are dropped so that long curves stay small."""
    steps: list[str] = []
    for x, y in points:
        step = f"{x:.1f} {y:.1f}"
        if not steps or steps[-1] != step:
            steps.append(step)
    return tag("path", d="M" + "L".join(steps), class_=class_) if steps else Markup("")


def stacked_bar(segments: Sequence[tuple[str, float, str]], scale: float, label: str) -> Markup:
    """A bar as wide as its container. `segments`: (css class, amount, tooltip); `scale` = full width."""
    x, parts = 0.0, []
    for class_, amount, tip in segments:
        width = 1000 * max(amount, 0) / scale if scale > 0 else 0.0
        parts.append(tag("rect", tag("title", tip), x=x, y=0, width=width, height=20, class_=class_))
        x += width
    return tag(
        "svg",
        *parts,
        viewBox="0 0 1000 20",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="bar",
    )


def _at(value: float, domain: tuple[float, float]) -> str:
    """Where `value` lies in `domain`, in percent of the width: the drawing then fits any column unbent."""
    low, high = domain
    return f"{100 * (min(max(value, low), high) - low) / ((high - low) or 1):.1f}%"


def dot_interval(
    point: float | None,
    bounds: Sequence[float | None] | None,
    subject: str,
    *,
    domain: tuple[float, float],
    reference: float | None = None,
) -> Markup:
    """A dot with its interval on a small axis; `reference` (chance, zero, control) is the dashed tick."""
    parts = [tag("line", x1="0%", x2="100%", y1=9, y2=9, class_="axis")]
    if reference is not None:
        x = _at(reference, domain)
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=18, class_="reference"))
    if bounds and None not in bounds:
        low, high = (_at(bound, domain) for bound in bounds)
        parts.append(tag("line", x1=low, x2=high, y1=9, y2=9, class_=f"whisker s-{subject}"))
    if point is not None:
        parts.append(tag("circle", cx=_at(point, domain), cy=9, r=3.8, class_=f"dot s-{subject}"))
    # The numbers stand in the cells beside it.
    return tag("svg", *parts, width="100%", height=18, aria_hidden="true", class_="cell-figure")


def cell_axis(marks: Sequence[tuple[float, str]], domain: tuple[float, float]) -> Markup:
    """The labels over a column of `dot_interval`s; the outermost are set inside the column."""
    parts = []
    for value, label in marks:
        side = "start" if value <= domain[0] else "end" if value >= domain[1] else "middle"
        parts.append(tag("text", label, x=_at(value, domain), y=11, class_=f"tick {side}"))
    return tag("svg", *parts, width="100%", height=14, aria_hidden="true", class_="cell-figure")


def level_bar(value: float | None, limit: float | None, subject: str) -> Markup:
    """A small bar of `value` on a scale from 0 to `limit`."""
    share = _at(value or 0.0, (0.0, limit)) if limit else "0%"
    track = tag("rect", x=0, y=3, width="100%", height=6, class_="track")
    fill = tag("rect", x=0, y=3, width=share, height=6, class_=f"fill s-{subject}")
    return tag("svg", track, fill, width=64, height=12, aria_hidden="true")


# --- panels ---


@dataclass(frozen=True)
class Curve:
    """One ROC curve: false and true positive rates, both rising from 0 to 1."""

    subject: str
    label: str
    auc: float | None
    fpr: Sequence[float]
    tpr: Sequence[float]


def roc_panel(name: str, curves: Sequence[Curve], *, log: bool, floor: float) -> Markup:
    """One attack's ROC curves with the chance line; on the log axis rates below `floor` sit at its left."""
    height, bottom = 224.0, 32.0
    w, h = WIDTH - LEFT - RIGHT, height - TOP - bottom

    def x(rate: float) -> float:
        if not log:
            return LEFT + w * rate
        return LEFT + w * (1 - math.log10(max(rate, floor)) / math.log10(floor))

    def y(rate: float) -> float:
        return TOP + h * (1 - rate)

    parts = []
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(rate), y2=y(rate), class_="grid"))
        parts.append(tag("text", f"{rate:.0%}", x=LEFT - 6, y=y(rate) + 3.5, class_="tick end"))
    decades = [10.0**k for k in range(math.ceil(math.log10(floor) - 1e-9), 1)]
    for rate in decades if log else (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(tag("line", x1=x(rate), x2=x(rate), y1=TOP, y2=TOP + h, class_="grid"))
        anchor = "tick end" if rate == 1 else "tick middle"
        parts.append(tag("text", f"{100 * rate:g}%", x=x(rate), y=TOP + h + 14, class_=anchor))
    parts.append(tag("text", "false positives", x=LEFT + w / 2, y=height - 3, class_="axis-name middle"))
    if floor < 0.01 or not log:
        parts.append(tag("line", x1=x(0.01), x2=x(0.01), y1=TOP, y2=TOP + h, class_="reference"))
    chance = [floor ** (1 - i / 40) for i in range(41)] if log else [0.0, 1.0]
    parts.append(path([(x(rate), y(rate)) for rate in chance], "chance"))
    parts += [
        path([(x(f), y(t)) for f, t in zip(curve.fpr, curve.tpr)], f"curve s-{curve.subject}") for curve in curves
    ]
    told = ", ".join(f"{curve.label} AUC {plain_number(curve.auc, 3)}" for curve in curves)
    scale = "logarithmic" if log else "linear"
    return picture(WIDTH, height, f"ROC curves of the {name} attack, {scale} axis: {told}", *parts, class_="panel")


@dataclass(frozen=True)
class LayerPoint:
    """One site in a layer panel; errors relative to the output energy, all may be missing."""

    name: str
    block: int
    error: float | None
    heldout: float | None
    expected: float | None
    clip: float | None


def ticks_log(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks within [low, high]: 1-2-5 per decade where `most` allows, else decades, else every n-th."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = low * (1 - 1e-9), high * (1 + 1e-9)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in multiples]
        ticks = [tick for tick in ticks if inside[0] <= tick <= inside[1]]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def _medians(points: Sequence[LayerPoint], field: str) -> list[tuple[int, float]]:
    """The median of a positive field per block (a block has several sites where experts share a name)."""
    values: dict[int, list[float]] = {}
    for point in points:
        value = getattr(point, field)
        if value is not None and value > 0:
            values.setdefault(point.block, []).append(value)
    return [(block, median(found)) for block, found in sorted(values.items())]


def layer_panel(
    name: str, points: Sequence[LayerPoint], *, blocks: int, domain: tuple[float, float], clip_top: float
) -> Markup:
    """Errors (log axis, shared `domain`) over clip rate (0 to `clip_top`) by block, for sites of one name."""
    height, h, strip, gap = 198.0, 132.0, 26.0, 14.0
    w = WIDTH - LEFT - RIGHT
    step = w / max(blocks, 1)
    low, high = (math.log10(bound) for bound in domain)
    base = TOP + h + gap + strip

    def x(block: float) -> float:
        return LEFT + step * (block + 0.5)

    def y(value: float) -> float:
        return TOP + h * (1 - (math.log10(min(max(value, domain[0]), domain[1])) - low) / ((high - low) or 1))

    parts = []
    for value in ticks_log(*domain):
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{100 * value:g}%", x=LEFT - 5, y=y(value) + 3.5, class_="tick end"))
    for field in ("expected", "error", "heldout"):
        line = [(x(block), y(value)) for block, value in _medians(points, field)]
        parts.append(path(line, f"series e-{field}"))
        if field != "expected" and blocks <= 48:
            marks = [(point.block, getattr(point, field)) for point in points]
            parts += [tag("circle", cx=x(b), cy=y(v), r=1.7, class_=f"mark e-{field}") for b, v in marks if v]
    parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=base, y2=base, class_="axis"))
    for block, value in _medians(points, "clip"):
        tall = strip * min(value / clip_top, 1) if clip_top > 0 else 0.0
        width = max(step * 0.7, 0.8)
        parts.append(tag("rect", x=x(block) - width / 2, y=base - tall, width=width, height=tall, class_="clip"))
    parts.append(tag("text", "clipped", x=LEFT - 5, y=base - strip / 2 + 3.5, class_="tick end"))
    for block in sorted({0, (blocks - 1) // 2, blocks - 1}):
        parts.append(tag("text", str(block), x=x(block), y=base + 14, class_="tick middle"))
    for point in points:
        tip = (
            f"{point.name}: calibration {percent(point.error, 2)}, held-out {percent(point.heldout, 2)}, "
            f"expected {percent(point.expected, 2)}, clipped {percent(point.clip, 2)}"
        )
        parts.append(
            tag(
                "rect",
                tag("title", tip),
                x=LEFT + step * point.block,
                y=TOP,
                width=step,
                height=base - TOP,
                class_="hit",
            )
        )
    heldout = [value for _, value in _medians(points, "heldout")]
    told = f"held-out error {percent(min(heldout), 2)} to {percent(max(heldout), 2)}" if heldout else "no errors"
    return picture(WIDTH, height, f"Relative error of {name} by block: {told}", *parts, class_="panel")

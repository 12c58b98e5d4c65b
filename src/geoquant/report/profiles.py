"""What lattice and basis could still gain, drawn: profiles of Gram-Schmidt lengths, and the gaps they leave.

A site's profile is in `report.json` as quantiles in decibels (`lattice.sphere.profile`), the longest length first.
Sites of one name share a panel: the line joins the medians over blocks, the band reaches from the least to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from markupsafe import Markup

from geoquant.lattice.sphere import CUBE_DB
from geoquant.report.figures import LEFT, RIGHT, TOP, WIDTH, path, picture, plain_number, tag

__all__ = ["limits", "profile_panel", "profile_panels"]

SERIES = ("lengths", "steps")
Band = Sequence[tuple[float, float, float]]  # least, median, largest in dB, by place in the profile


def limits(sites: Sequence[dict]) -> dict | None:
    """Least, median and largest `gap`, `headroom` and (where rows take over errors) `rows` in dB, and the sites with
    the flattest and the steepest profile; None where no site has a gap."""
    told = [site for site in sites if site.get("gap_db") is not None and site.get("headroom_db") is not None]
    if not told:
        return None

    def spread(key: str) -> tuple[float, float, float]:
        values = [site.get(key) or 0.0 for site in told]
        return min(values), median(values), max(values)

    rows = spread("rows_db")
    order = sorted(told, key=lambda site: site["headroom_db"])
    return {
        "cube": CUBE_DB,
        "gap": spread("gap_db"),
        "headroom": spread("headroom_db"),
        "rows": rows if rows[2] >= 0.005 else None,
        "flattest": order[0],
        "steepest": order[-1],
    }


def profile_panels(groups: Mapping[tuple[str, str], Sequence[dict]]) -> list[dict]:
    """One panel for every group of sites (name, kind) that has profiles, all on one scale."""
    found = {}
    for key, sites in groups.items():
        profiles = [profile for site in sites if (profile := site.get("profile")) and _complete(profile)]
        if profiles:
            found[key] = {name: _band([profile[name] for profile in profiles]) for name in SERIES}
    values = [value for bands in found.values() for band in bands.values() for place in band for value in place]
    domain = (min(values), max(values)) if values else (0.0, 0.0)
    return [
        {"name": name, "kind": kind, "svg": profile_panel(name, bands, domain)} for (name, kind), bands in found.items()
    ]


def _complete(profile: dict) -> bool:
    return all(len(profile[name] or []) > 1 and None not in profile[name] for name in SERIES)


def _band(profiles: Sequence[Sequence[float]]) -> Band:
    return [(min(place), median(place), max(place)) for place in zip(*profiles)]


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of a round number of decibels that cover the domain with four to nine lines."""
    step = next((step for step in (1, 2, 5, 10, 20, 50) if (high - low) / step <= 6), 100)
    return [float(step * k) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def profile_panel(name: str, bands: Mapping[str, Band], domain: tuple[float, float]) -> Markup:
    """Lengths before and after their steps, in dB from their geometric mean, over the share of columns."""
    height, bottom = 190.0, 32.0
    w, h = WIDTH - LEFT - RIGHT, height - TOP - bottom
    ticks = _ticks(min(domain[0], -1.0), max(domain[1], 1.0))
    low, high = ticks[0], ticks[-1]

    def x(share: float) -> float:
        return LEFT + w * share

    def y(value: float) -> float:
        return TOP + h * (high - value) / (high - low)

    parts = []
    for value in ticks:
        mark = "reference" if value == 0 else "grid"
        parts.append(tag("line", x1=LEFT, x2=LEFT + w, y1=y(value), y2=y(value), class_=mark))
        label = plain_number(value, 0)
        parts.append(tag("text", f"+{label}" if value > 0 else label, x=LEFT - 6, y=y(value) + 3.5, class_="tick end"))
    for share, side in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(tag("text", f"{share:.0%}", x=x(share), y=TOP + h + 14, class_=f"tick {side}"))
    parts.append(tag("text", "columns, longest first", x=LEFT + w / 2, y=height - 3, class_="axis-name middle"))
    for series in reversed(SERIES):  # the dashed line on top: where steps are even, both lines are one
        band = bands[series]
        places = [x(index / (len(band) - 1)) for index in range(len(band))]
        upper = [(place, y(top)) for place, (_, _, top) in zip(places, band)]
        lower = [(place, y(bottom)) for place, (bottom, _, _) in zip(places, band)]
        parts.append(path([*upper, *reversed(lower)], f"band g-{series}"))
        parts.append(path([(place, y(middle)) for place, (_, middle, _) in zip(places, band)], f"series g-{series}"))
    told = "; ".join(
        f"{label} from {plain_number(bands[series][-1][1], 1)} to {plain_number(bands[series][0][1], 1)} dB"
        for series, label in (("lengths", "lengths r"), ("steps", "lengths times steps"))
    )
    return picture(WIDTH, height, f"Profile of {name}, medians over blocks: {told}", *parts, class_="panel")

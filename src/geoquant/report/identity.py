"""The page of an identification: labels, effects with their intervals, and how far they can be trusted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from markupsafe import Markup

from geoquant.outliers.findings import named
from geoquant.outliers.taxonomy import BOTH, FUNCTIONAL, NEITHER, SENSITIVE
from geoquant.report.page import fingerprint, finite, rendered, write_page
from geoquant.report.scatter import Point, effect_panel

__all__ = ["render", "write_identity"]

LABELS = (FUNCTIONAL, SENSITIVE, BOTH, NEITHER)
FINEST = ("reference", "loss")  # the attack that is drawn and shown: the first that was made


def render(found: dict) -> str:
    """The page of what `geoquant.identify` returned."""
    mark, found = fingerprint(found), finite(found)
    groups = named(found["groups"])
    count = len({row["group"] for row in found["rows"]})
    done = [part_of(do, [row for row in found["rows"] if row["intervention"] == do]) for do in found["settings"]["do"]]
    return rendered(
        "identity.html.jinja",
        scripts=("copy.js", "sort.js"),
        p=found,
        fingerprint=mark,
        groups=groups,
        headline=f"{found['model']['name']}: {count} {groups}, by what happens without them.",
        labels=LABELS,
        done=done,
        attack=next((name for name in FINEST if name in found["before"]), None),
    )


def part_of(do: str, rows: list[dict]) -> dict:
    """What the page shows of one intervention."""
    roles = list(dict.fromkeys(row["role"] for row in rows))
    counts = [(role, Counter(row["label"] for row in rows if row["role"] == role)) for role in roles]
    return {"do": do, "rows": rows, "counts": counts, "map": label_map(rows), "figures": figures(rows)}


def label_map(rows: list[dict]) -> dict | None:
    """Blocks down, kinds across; None where a cell would hold several groups."""
    cells = {(row["block"], row["kind"]): index for index, row in enumerate(rows)}
    if len(cells) < len(rows):
        return None
    kinds, blocks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "block"))
    return {"kinds": kinds, "rows": [(block, [cells.get((block, kind)) for kind in kinds]) for block in blocks]}


def figures(rows: list[dict]) -> list[tuple[str, str, Markup]]:
    """(heading, caption, drawing): rise of public NLL against fall of the gap, and of an attack's advantage."""
    kept = [row for row in rows if row["effect"]["public"]["value"] is not None]
    lost = len(rows) - len(kept)
    drawn = []
    for heading, read in {"Gap": gap_of, "Advantage": advantage_of}.items():
        points = [
            Point(
                row["effect"]["public"]["value"],
                tuple(row["effect"]["public"]["ci"] or (row["effect"]["public"]["value"],) * 2),
                *measured[:2],
                row["label"],
                row["sentence"],
            )
            for row in kept
            if (measured := read(row["effect"])) is not None
        ]
        if not points:
            continue
        name = next(read(row["effect"])[2] for row in kept if read(row["effect"]) is not None)
        panel = effect_panel(points, threshold=rows[0]["threshold"], across="rise of public NLL, nats", up=name)
        caption = f"{name[0].upper()}{name[1:]}, upwards; 95% intervals."
        caption += f" {lost} groups that leave no model are not drawn." if lost else ""
        drawn.append((heading, caption, panel))
    return drawn


def gap_of(effect: dict) -> tuple[float, tuple[float, float], str] | None:
    """Fall of the gap with its interval."""
    gap = effect["gap"]
    if gap is None:
        return None
    value, half = -gap["value"], 1.96 * gap["se"]
    return value, (value - half, value + half), "fall of the gap between members' and others' losses, nats"


def advantage_of(effect: dict) -> tuple[float, tuple[float, float], str] | None:
    """Fall of an attack's advantage with its interval."""
    name = next((name for name in FINEST if name in effect["attacks"]), None)
    if name is None:
        return None
    one = effect["attacks"][name]
    return -one["value"], (-one["ci"][1], -one["ci"][0]), f"fall of the advantage of the {name} attack"


def write_identity(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write identity.json and identity.html, each by rename of a complete file."""
    return write_page(folder, "identity", render(found), found)

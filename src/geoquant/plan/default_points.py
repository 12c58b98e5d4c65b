"""The points that a frontier measures if nobody names others: every lever alone and together, and what it has to beat.

Levers that this version does not have are found by their fields of a recipe, so that the list grows with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from geoquant.plan.points import INPUTS, ORIGINAL, Change, Point
from geoquant.recipe import Recipe

__all__ = ["default_points"]

RADIUS = 0.003  # of the weight ball that is guaranteed: the noise for a longer one leaves little of a small model
BASE = ("base",)
APART = ("everything", "metric")  # a baseline of its own, and what goes with no other lever and does about the same
PASSES = {"forget": 4, "refine": 8}
STRENGTHS = (
    (0.5, 3.25),
    (0.7, 3.25),
    (0.85, 3.25),
    (1.0, 3.25),
    (0.7, 4.25),
)  # of an aimed anchor, and bits per weight


def default_points(fields: Mapping = Recipe.model_fields) -> tuple[Point, ...]:
    """The list, the original first. fields: of the recipe."""
    return Point(ORIGINAL, "original", quantize=False), *_plain(), *_everywhere(), *_levers(fields), *_guarantees()


def _plain() -> list[Point]:
    """Fewer bits and nothing else."""
    return [
        *(
            Point(f"{method} {bits} bits", "rounding", {"grid": "box", "bits": bits, "method": method})
            for method in ("rtn", "babai")
            for bits in (8, 4, 3)
        ),
        *(Point(f"lattice {rate:g}", "lattice", {"rate": rate}) for rate in (8.0, 4.25, 3.25)),
        Point("lattice 3.25, embeddings as stored", "lattice", {"rate": 3.25, "embeddings": False}),
        Point("keep 1%, babai 3 bits", "shape", {"grid": "box", "bits": 3, "keep": 0.01}),
        Point("klein 3.25", "shape", {"rate": 3.25, "method": "lattice-klein", "row_block": 1}),
    ]


def _everywhere() -> list[Point]:
    """The same for all weights: a share of the way back to the base, or noise."""
    back = [(share, 3.25) for share in (0.8, 0.6, 0.4, 0.2)] + [(0.4, 4.25)]
    return [
        *(
            Point(
                f"interpolate {share:g}, lattice {rate:g}",
                "interpolation",
                {"rate": rate, "anchor": round(1 - share, 9), "aim": "everything"},
                needs=BASE,
            )
            for share, rate in back
        ),
        Point("interpolate 0.4", "interpolation", {}, Change("interpolate", 0.4), quantize=False, needs=BASE),
        *(
            Point(f"noise {amount:g}", "noise", {}, Change("noise", amount), quantize=False)
            for amount in (0.1, 0.25, 0.5, 1.2, 2.0)
        ),
        Point("noise 0.25, lattice 3.25", "noise", {"rate": 3.25}, Change("noise", 0.25)),
    ]


def _levers(fields: Mapping) -> list[Point]:
    """What this version can aim, forget and refine: alone, at several strengths, and together at two sizes."""
    aims = [aim for aim in get_args(fields["aim"].annotation) if aim not in APART] if "aim" in fields else []
    points = [_aimed(aim, strength, rate) for aim in aims for strength, rate in STRENGTHS]
    for lever in (name for name in PASSES if name in fields):
        points.append(Point(f"{lever}, lattice 3.25", "shape", {"rate": 3.25, lever: PASSES[lever]}, needs=INPUTS))
        points += [_aimed(aim, 0.7, rate, lever) for aim in aims for rate in (3.25, 4.25)]
    return points


def _aimed(aim: str, strength: float, rate: float, lever: str | None = None) -> Point:
    options = {"rate": rate, "anchor": strength, "aim": aim} | ({lever: PASSES[lever]} if lever else {})
    name = f"anchor {strength:g} by {aim}{f', {lever}' if lever else ''}, lattice {rate:g}"
    return Point(name, "together" if lever else "anchor", options, needs=INPUTS)


def _guarantees() -> list[Point]:
    """Releases of all weights under a weight ball, whose adjacency every row states."""
    return [
        Point(
            f"epsilon {epsilon:g}, ball of {RADIUS:g}, lattice 4.25",
            "guarantee",
            {"rate": 4.25, "epsilon": epsilon, "delta": 1e-5, "radius": RADIUS},
            needs=BASE,
        )
        for epsilon in (8.0, 2.0, 1.0)
    ]

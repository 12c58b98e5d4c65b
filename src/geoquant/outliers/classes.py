"""What an analysis says of a site's geometry: classes of its columns, and the distortion that rounding its rows makes.

Columns are classed one by one (fsgd.py) with cutoffs that are quantiles of the site's null: without structure a site
has as many of a class as its null, up to chance, which is about the root of both together. The distortion is that of
the rounding error in the token-weighted metric (geometry/metric.py), of at most 128 rows, evenly spaced, beside noise
as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from geoquant.geometry.metric import judged_distortion
from geoquant.geometry.tangent import NEIGHBOURS
from geoquant.outliers.context import SiteContext
from geoquant.outliers.fsgd import CLASSES, fsgd

__all__ = ["judged", "sentences"]

ROWS = 128
LEAST = 3  # columns that have neighbours enough to be dense or lonely among


def judged(context: SiteContext, seed: int = 0) -> dict:
    """Facts for JSON: `columns` (counts of each class, those of the null, rank correlation of isolation and length) and
    `distortion` (MD and its null, medians over rows, and their ratio with the standard error of its logarithm).

    Each is None where the site is too small: fewer than 3 columns, or no 32 neighbours of a row.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = context.weight.shape[1]
    return {
        "columns": _columns(context, generator) if columns >= LEAST else None,
        "distortion": _distortion(context, generator) if len(context.weight) > NEIGHBOURS else None,
    }


def _columns(context: SiteContext, generator: torch.Generator) -> dict:
    found = fsgd(context, generator, size=1, by_null=True)
    return {
        "of": context.weight.shape[1],
        "counts": found.counts,
        "null": {name: _number(count) for name, count in found.null_counts.items()},
        "lengths": _number(found.lengths),
        "null_lengths": _number(found.null_lengths),
    }


def _distortion(context: SiteContext, generator: torch.Generator) -> dict:
    weight, metric = context.weight, context.public.mean("weighted")
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long().to(weight.device)
    whole = judged_distortion(weight, weight + context.delta, generator, metric, rows=rows, draws=1).whole
    named = {"md": whole.md, "null": whole.null_md, "ratio": whole.ratio, "error": whole.error}
    return {name: _number(value) for name, value in named.items()} | {"rows": whole.rows}


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def sentences(sites: Sequence[dict]) -> list[str]:
    """Findings of an analysis whose sites have `classes`: one on columns, one on distortion."""
    classed = [one for site in sites if (one := site.get("classes", {}).get("columns"))]
    bent = [one for site in sites if (one := site.get("classes", {}).get("distortion")) and one["ratio"] is not None]
    told = []
    if classed:
        whole = sum(one["of"] for one in classed)
        shares = []
        for name in CLASSES[:0:-1]:
            own, null = (sum(one[key][name] for one in classed) for key in ("counts", "null"))
            more = sum(one["counts"][name] - one["null"][name] > 2 * _chance(one, name) for one in classed)
            shares.append(f"{own / whole:.2%} {name}s (null {null / whole:.2%}, more at {more})")
        told.append(f"Classes of columns at {len(classed)} sites: {', '.join(shares)}.")
    if bent:
        ratios = sorted(one["ratio"] for one in bent)
        apart = sum(one["error"] is not None and abs(math.log(one["ratio"])) > 2 * one["error"] for one in bent)
        told.append(
            f"Distortion of rows by rounding in the metric of the inputs: {ratios[len(ratios) // 2]:.3f} times that of "
            f"noise as long (median of {len(bent)} sites, {ratios[0]:.3f} to {ratios[-1]:.3f}); beyond two standard "
            f"errors at {apart}."
        )
    return told


def _chance(one: dict, name: str) -> float:
    """Standard deviation of a count less that of a null by the null's cutoffs."""
    return max(1.0, one["counts"][name] + one["null"][name]) ** 0.5

"""Manifold distortion: how far a change of weights leaves the tangent space of the cloud they lie in.

    MD = |(I - U U^T) delta| / |n|,    n = (I - U U^T) (w - c)

U spans the tangent space at w and c is the mean of its neighbours, so n is w's own distance from that space. What it
is: rounding noise knows of no tangent space, and its normal share is `sqrt(1 - d / D)` on real matrices to within 0.005
(docs/results.md), so that Euclidean MD is the relative rounding error in another unit. In the metric of the inputs it
carries function. Both are compared with a null here: noise of the same length in a random direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.geometry.tangent import NEIGHBOURS, SHARE, frames

__all__ = [
    "Cache",
    "Distortion",
    "attention_distortion",
    "cache",
    "distortion",
    "distortions",
    "expert_distortion",
    "median_distortions",
    "quick",
    "sampled_distortions",
]


PIECE = 1 << 17  # numbers of the cached bases at once


@dataclass(frozen=True)
class Distortion:
    """Of each row: MD, the share of the change that is normal, and the tangent dimension.

    md is infinite for a row that lies in its tangent space; share is NaN for a row that did not change.
    """

    md: Float[Tensor, " m"]
    share: Float[Tensor, " m"]
    dims: Int[Tensor, " m"]


def distortion(
    points: Float[Tensor, "n D"],
    changes: Float[Tensor, "n D"],
    k: int = NEIGHBOURS,
    share: float = SHARE,
    rows: Int[Tensor, " m"] | None = None,
) -> Distortion:
    """MD of every row, or of `rows` only (of outliers, say: the cost goes with their number, neighbours are exact)."""
    return distortions(points, (changes,), k, share, rows)[0]


def distortions(
    points: Float[Tensor, "n D"],
    changes: Sequence[Float[Tensor, "n D"]],
    k: int = NEIGHBOURS,
    share: float = SHARE,
    rows: Int[Tensor, " m"] | None = None,
) -> list[Distortion]:
    """MD of several changes of the same points, the tangent spaces found once."""
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in changes]
    for part in frames(points, k, share, rows):
        offset, deltas = points[part.points] - part.centres, [change[part.points] for change in changes]
        own, *moved = part.normal_squares(offset, *deltas)
        inside = own <= 1e-8 * offset.square().sum(1)  # within single precision nothing is left of the distance
        for parts, delta, normal in zip(found, deltas, moved, strict=True):
            md = torch.where(inside, torch.inf, (normal / own).sqrt())
            parts.append((md, (normal / delta.square().sum(1)).sqrt(), part.dims))
    return [Distortion(*(torch.cat(column) for column in zip(*parts, strict=True))) for parts in found]


def median_distortions(
    points: Float[Tensor, "n D"], changes: Sequence[Float[Tensor, "n D"]], rows: int = 48
) -> list[float]:
    """Median MD of each change over `rows` rows that are spread evenly, their neighbours sought among all.

    NaN where no row has one: too few rows to have neighbours, or all within their tangent spaces.
    """
    found = sampled_distortions(points, changes, rows)
    return [md.median().item() if len(md) else math.nan for md in found]


def sampled_distortions(
    points: Float[Tensor, "n D"], changes: Sequence[Float[Tensor, "n D"]], rows: int = 48
) -> list[Float[Tensor, " m"]]:
    """MD of each change of `rows` rows that are spread evenly; of those that have one."""
    count = len(points)
    neighbours_ = min(NEIGHBOURS, count - 1)
    if neighbours_ < 2:
        return [points.new_zeros(0) for _ in changes]
    asked = torch.linspace(0, count - 1, min(rows, count), device=points.device).round().long()
    found = [one.md for one in distortions(points, changes, k=neighbours_, rows=asked)]
    return [md[md.isfinite()] for md in found]


# ---- a check that is quick enough for a device


@dataclass(frozen=True)
class Cache:
    """Tangent bases of some rows in half precision, to check a change of the weights without neighbours or components.

    rows: which. bases: (m, d, D), zero where a row has fewer dimensions. normals: (m,) each row's own distance from
    its tangent space.
    """

    rows: Int[Tensor, " m"]
    bases: Float[Tensor, "m d D"]
    normals: Float[Tensor, " m"]


def cache(points: Float[Tensor, "n D"], rows: Int[Tensor, " m"], k: int = NEIGHBOURS, share: float = SHARE) -> Cache:
    """What `quick` needs of `rows`: m k D half-precision numbers at most."""
    parts = list(frames(points, k, share, rows))
    most = max(int(part.dims.max()) for part in parts)
    bases = torch.cat([part.bases[:, :most].to(torch.float16) for part in parts])
    normals = [part.normal_squares(points[part.points] - part.centres)[0].sqrt() for part in parts]
    return Cache(rows, bases, torch.cat(normals))


def quick(known: Cache, changes: Float[Tensor, "m D"]) -> Float[Tensor, " m"]:
    """MD of the cached rows, given their changes."""
    # A few rows at a time: what is converted stays in the processor's cache.
    step = max(1, PIECE // max(1, known.bases[0].numel()))
    pairs = zip(known.bases.split(step), changes.split(step), strict=True)
    inside = torch.cat([(bases.to(own.dtype) @ own[:, :, None]).square().sum((1, 2)) for bases, own in pairs])
    return (changes.square().sum(1) - inside).clamp_min(0).sqrt() / known.normals


# ---- one number for several matrices


def attention_distortion(inside: float, out: float, energy_inside: float, energy_out: float) -> float:
    """Root mean square of the distortions of attention's inputs and of its output, weighted by output energy.

    They live in different spaces, so there is no angle between their normals to weigh them by.
    """
    total = energy_inside + energy_out
    return ((energy_inside * inside**2 + energy_out * out**2) / total) ** 0.5 if total > 0 else 0.0


def expert_distortion(distortions: Sequence[float], frequencies: Sequence[float]) -> float:
    """`sum_k f_k MD_k` over experts, f_k the share of tokens that a router sends to each (made to sum to one)."""
    if len(distortions) != len(frequencies) or min(frequencies, default=-1) < 0 or sum(frequencies) <= 0:
        raise ValueError("one frequency per expert, none negative, not all zero")
    return sum(md * f for md, f in zip(distortions, frequencies, strict=True)) / sum(frequencies)

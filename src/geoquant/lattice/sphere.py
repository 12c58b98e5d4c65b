"""The sphere bound: the least error any lattice of the same density could expect, and how far above it a layer lies.

A lattice fills space with copies of one cell. Of all cells of one volume the ball has the least second moment, so a
lattice with `c` columns, lengths r_j and steps s_j cannot expect less than

    c G_c (prod_j r_j s_j)^(2/c),    G_c = Gamma(c/2 + 1)^(2/c) / ((c + 2) pi) > 1 / (2 pi e)

per row, whatever its basis and whoever searches it (Conway and Sloane, Sphere Packings, chapter 2). The bound used
here has the limit `1 / (2 pi e)` in place of G_c: it holds in every dimension, also for codes that span several rows of
equal density, and it makes the gap a sum of two things that mean something.

Babai's cells are boxes with the sides r_j s_j, so its expected error is `1/12 sum_j r_j^2 s_j^2` and

    gap = 10 log10(2 pi e / 12)  +  10 log10(arithmetic / geometric mean of r_j^2 s_j^2)
        = 1.53 dB                +  headroom

The first part is that a cube is no ball: only another lattice, such as those of vector quantizers, could gain some of
it. The second is that the box is no cube: all that a reduction of the basis (LLL, BKZ) could ever gain, because it
leaves the product of the lengths as it is. It is zero exactly where all r_j s_j of a row are equal.

All of this is about weights spread over many cells and about the damped metric. Where steps are as long as the weights,
or where damping is large, what a solution achieves may lie below its own expectation, and below the sphere bound.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BALL", "CUBE_DB", "POINTS", "decibels", "profile"]

BALL = 1 / (2 * math.pi * math.e)  # second moment per dimension of a ball of volume one, in the limit
CUBE_DB = 10 * math.log10(1 / 12 / BALL)
POINTS = 17  # of a profile: the extremes, the median, the quarters and three points between each two


def decibels(above: float, below: float) -> float | None:
    """`10 log10(above / below)`; None where one of them is not a positive finite number."""
    if not (0 < above < math.inf and 0 < below < math.inf):
        return None
    return 10 * math.log10(above / below)


def profile(lengths: Float[Tensor, " n"]) -> list[float] | None:
    """The spectrum of Gram-Schmidt lengths in POINTS numbers: quantiles, the longest first, of `10 log10 r_j^2` in dB
    from their mean, hence from the geometric mean; to a tenth of a dB.

    The lengths' unit drops out. The decibels are those of the gap: the headroom is 10 log10 of the mean of
    `10^(dB/10)`. None without lengths, or where one is not a positive number.
    """
    levels = 20 * lengths.double().log10()
    if not len(levels) or not levels.isfinite().all():
        return None
    places = torch.linspace(1, 0, POINTS, dtype=levels.dtype, device=levels.device)
    found = torch.quantile(levels - levels.mean(), places)
    return [round(value, 1) + 0.0 for value in found.tolist()]

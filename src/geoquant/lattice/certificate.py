"""What the lattice promises for a solved layer: bound, expected error, sphere bound, achieved error.

For rows quantized by Babai with Gram-Schmidt lengths r_j and steps s_j, none of them clipped,

    (w-q)^T A (w-q) <= 1/4 sum_j r_j^2 s_j^2            (bound)
    E (w-q)^T A (w-q) = 1/12 sum_j r_j^2 s_j^2          (rounding errors uniform)

with A the damped metric that was solved. No lattice of the same density could expect less than the sphere bound,
`c/(2 pi e) (prod_j r_j s_j)^(2/c)` with c columns (see `sphere`). Clipping voids all three, so the clip rate is
reported beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.sphere import BALL, decibels

__all__ = ["Certificate", "Squares", "certificate", "error_energies", "squared_steps"]


@dataclass(frozen=True)
class Certificate:
    """Errors summed over the rows of a site, relative to its output energy `tr(W A W^T)`.

    sphere_bound: the least that lattices with the density of these rows could expect, in the same units and the same
                  metric A. A row keeps its density: nothing is said about dividing bits among rows in another way.
    gap_db:       `10 log10(expected_error / sphere_bound)` = 1.53 + headroom_db + rows_db; None without a density.
    headroom_db:  the largest gain of any reduction of the basis of the columns.
    rows_db:      what rows take over, on purpose, from rows before them (`RowMetric`). In A alone that is a loss; it is
                  the gain in the metric of the loss that was solved. Zero where rows are strangers to each other.
    """

    error: float
    heldout_error: float | None
    expected_error: float
    bound: float
    clip_rate: float
    sphere_bound: float
    gap_db: float | None
    headroom_db: float | None
    rows_db: float | None


@dataclass(frozen=True)
class Squares:
    """What a certificate is made of, summed over the rows of a site, in the units of `A`.

    planes:   `sum_j r_j^2 s_ij^2`, the squared distances between the planes.
    floor:    `c (prod_j r_j s_ij)^(2/c)`, the least value of `planes` in any basis of the same lattice; c columns.
    expected: twelve times the expected error; more than `planes` where rows take over errors of other rows.
    worst:    four times the bound.
    """

    planes: float
    floor: float
    expected: float
    worst: float


PART = 1 << 13


def error_energies(
    rows: Float[Tensor, "out in"] | Iterable[Float[Tensor, "part in"]], *metrics: Float[Tensor, "in in"]
) -> list[float]:
    """`tr(D A D^T)` of a matrix of rows, whole or in parts, under each metric: one product `D^T D` serves them all."""
    gram = sum(part.T @ part for part in ((rows,) if isinstance(rows, Tensor) else rows))
    # Row by row in single precision, which is many times faster, and only the rows in double.
    return [(gram * metric).sum(1).sum(dtype=torch.float64).item() for metric in metrics]


def squared_steps(
    scales: Float[Tensor, "out groups"], lengths: Float[Tensor, " in"], kept: Int[Tensor, " k"], group_size: int
) -> Squares:
    """Rows that are strangers to each other, with one step per group of columns; kept columns are continuous and count
    nothing, nor are they dimensions of the lattice."""
    rounded = torch.ones(len(lengths), dtype=torch.float64, device=lengths.device)
    rounded[kept] = 0.0
    energy, steps = lengths.double().square() * rounded, scales.double().square()
    group = torch.arange(len(energy), device=energy.device) // group_size

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(scales.shape[1]).index_add_(0, group, values)

    planes = (steps @ per_group(energy)).sum().item()
    count = rounded.sum()
    # xlogy: what has no column, or is kept, adds nothing, whatever its step or length.
    logs = torch.special.xlogy(per_group(rounded), steps).sum(1) + torch.special.xlogy(rounded, energy).sum()
    floor = (count * (logs / count.clamp_min(1)).exp()).sum().item()
    return Squares(planes, floor, planes, planes)


def certificate(
    original: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"] | Iterable[Float[Tensor, "part in"]],
    metric: Float[Tensor, "in in"],
    heldout: Float[Tensor, "in in"] | None,
    squares: Squares,
    clip_rate: float,
) -> Certificate:
    """Compare one site with what its lattice promises.

    original: the rows that were to be approximated, the weights or an output target. quantized: whole, or some rows at
    a time. metric: moments the site was solved on. heldout: moments of tokens that chose its damping.
    """
    metrics = (metric,) if heldout is None else (metric, heldout)
    found = error_energies(_differences(original, quantized), *metrics)
    parts = (part.float() for part in original.split(PART))
    energies = [max(energy, 1e-30) for energy in error_energies(parts, *metrics)]
    energy = energies[0]
    return Certificate(
        error=found[0] / energy,
        heldout_error=None if heldout is None else found[1] / energies[1],
        expected_error=squares.expected / 12 / energy,
        bound=squares.worst / 4 / energy,
        clip_rate=clip_rate,
        sphere_bound=BALL * squares.floor / energy,
        gap_db=decibels(squares.expected / 12, BALL * squares.floor),
        headroom_db=decibels(squares.planes, squares.floor),
        rows_db=decibels(squares.expected, squares.planes),
    )


def _differences(original: Tensor, quantized: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    start = 0
    for part in (quantized,) if isinstance(quantized, Tensor) else quantized:
        yield part - original[start : start + len(part)]
        start += len(part)

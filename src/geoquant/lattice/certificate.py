"""What the lattice promises for a solved layer: bound, expected error, achieved error.

For rows quantized by Babai with Gram-Schmidt lengths r_j and steps s_j, none of them clipped,

    (w-q)^T A (w-q) <= 1/4 sum_j r_j^2 s_j^2            (bound)
    E (w-q)^T A (w-q) = 1/12 sum_j r_j^2 s_j^2          (rounding errors uniform)

with A the damped metric that was solved. Clipping voids both, so the clip rate is reported beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Certificate", "certificate", "error_energies", "squared_steps"]


@dataclass(frozen=True)
class Certificate:
    """Errors summed over the rows of a site, relative to its output energy `tr(W A W^T)`."""

    error: float
    heldout_error: float | None
    expected_error: float
    bound: float
    clip_rate: float


def error_energies(rows: Float[Tensor, "out in"], *metrics: Float[Tensor, "in in"]) -> list[float]:
    """`tr(D A D^T)` of one matrix of rows under each metric: one product `D^T D` serves them all."""
    gram = rows.T @ rows
    return [(gram * metric).sum(dtype=torch.float64).item() for metric in metrics]


def squared_steps(
    scales: Float[Tensor, "out groups"], lengths: Float[Tensor, " in"], kept: Int[Tensor, " k"], group_size: int
) -> float:
    """`sum over rows and columns of r_j^2 s_j^2`; kept columns are continuous and count nothing."""
    energy = lengths.double().square()
    energy[kept] = 0.0
    group = torch.arange(len(energy), device=energy.device) // group_size
    per_group = torch.zeros(scales.shape[1], dtype=torch.float64, device=energy.device).index_add_(0, group, energy)
    return (scales.double().square() @ per_group).sum().item()


def certificate(
    original: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    heldout: Float[Tensor, "in in"] | None,
    squares: float,
    clip_rate: float,
    worst: float | None = None,
) -> Certificate:
    """Compare one site with what its lattice promises.

    original: the rows that were to be approximated, the weights or an output target.
    metric:  moments the site was solved on. heldout: moments of tokens that chose its damping.
    squares: `sum over rows and columns of r_j^2 s_ij^2`, see `squared_steps`. worst: the same for the bound, where rows
             take over errors of other rows.
    """
    metrics = (metric,) if heldout is None else (metric, heldout)
    errors = error_energies(quantized - original, *metrics)
    energies = [max(energy, 1e-30) for energy in error_energies(original, *metrics)]
    energy = energies[0]
    return Certificate(
        error=errors[0] / energy,
        heldout_error=None if heldout is None else errors[1] / energies[1],
        expected_error=squares / 12 / energy,
        bound=(squares if worst is None else worst) / 4 / energy,
        clip_rate=clip_rate,
    )

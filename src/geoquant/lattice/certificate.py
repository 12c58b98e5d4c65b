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

__all__ = ["Certificate", "certificate", "error_energy"]


@dataclass(frozen=True)
class Certificate:
    """Errors summed over the rows of a site, relative to its output energy `tr(W A W^T)`."""

    error: float
    heldout_error: float | None
    expected_error: float
    bound: float
    clip_rate: float


def error_energy(difference: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]) -> float:
    """`tr(D A D^T)`."""
    return ((difference @ metric) * difference).sum(dtype=torch.float64).item()


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
    scales: Float[Tensor, "out groups"],
    lengths: Float[Tensor, " in"],
    kept: Int[Tensor, " k"],
    group_size: int,
    clip_rate: float,
) -> Certificate:
    """Compare one site with what its lattice promises.

    metric:  moments the site was solved on. heldout: moments of tokens that chose its damping.
    """
    difference = quantized - original
    energy = max(error_energy(original, metric), 1e-30)
    steps = squared_steps(scales, lengths, kept, group_size)
    held = None
    if heldout is not None:
        held = error_energy(difference, heldout) / max(error_energy(original, heldout), 1e-30)
    return Certificate(
        error=error_energy(difference, metric) / energy,
        heldout_error=held,
        expected_error=steps / 12 / energy,
        bound=steps / 4 / energy,
        clip_rate=clip_rate,
    )

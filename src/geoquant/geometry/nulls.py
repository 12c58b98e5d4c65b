"""What a figure is compared with: clouds and changes that hold no geometry.

A figure without its null says nothing: in 576 dimensions a random vector has |cos| 0.03 with any axis, and k neighbours
span k - 1 dimensions of anything.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gaussian_cloud", "matched_noise", "shuffled_columns"]


def gaussian_cloud(points: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, "n D"]:
    """A Gaussian cloud with the mean and the covariance of the points: all that is not linear is gone."""
    centred = points - points.mean(0)
    mixed = torch.randn(len(points), len(points), generator=generator, dtype=points.dtype).to(points.device)
    return points.mean(0) + mixed @ centred / len(points) ** 0.5


def shuffled_columns(points: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, "n D"]:
    """Every column in an order of its own: marginals stay, all dependence is gone."""
    order = torch.rand(points.shape, generator=generator).argsort(0).to(points.device)
    return points.gather(0, order)


def matched_noise(changes: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, "n D"]:
    """Noise of a random direction, as long in every row as the change."""
    noise = torch.randn(changes.shape, generator=generator, dtype=changes.dtype).to(changes.device)
    return noise * (changes.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))

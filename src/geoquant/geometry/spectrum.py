"""What a change does to the spectrum and the leading subspaces of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SpectrumChange", "effective_rank", "principal_angles", "spectrum_change"]

LEADING = 32


@dataclass(frozen=True)
class SpectrumChange:
    """From one matrix to another of the same shape.

    relative: `|s' - s| / |s|` of the sorted singular values. angles: principal angles in radians between the leading
    right singular subspaces, the largest last. kl: KL divergence in nats of the squared spectra, each made to sum to
    one, the changed one second. ranks: effective ranks before and after.
    """

    relative: float
    angles: tuple[float, ...]
    kl: float
    ranks: tuple[float, float]


def spectrum_change(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], leading: int = LEADING
) -> SpectrumChange:
    """How singular values and the `leading` right singular vectors move."""
    (_, s, v), (_, t, w) = (torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in (before, after))
    p, q = (x.square() / x.square().sum() for x in (s, t))
    used = p > 0
    kl = (p[used] * (p[used].log() - q[used].clamp_min(1e-300).log())).sum()
    angles = principal_angles(v[:leading].T, w[:leading].T)
    ranks = effective_rank(s), effective_rank(t)
    return SpectrumChange(((t - s).norm() / s.norm()).item(), tuple(angles.tolist()), kl.item(), ranks)


def principal_angles(one: Float[Tensor, "D k"], other: Float[Tensor, "D k"]) -> Float[Tensor, " k"]:
    """Angles in radians between two subspaces with orthonormal bases, the smallest first.

    Small angles come from their sines, of which the cosine has no digits: Björck and Golub, Numerical methods for
    computing angles between linear subspaces, 1973.
    """
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1.0)
    sines = torch.linalg.svdvals(other - one @ (one.T @ other)).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def effective_rank(singular: Float[Tensor, " n"]) -> float:
    """exp of the entropy of the singular values made to sum to one (Roy and Vetterli, EUSIPCO 2007)."""
    shares = singular[singular > 0] / singular.sum()
    return torch.exp(-(shares * shares.log()).sum()).item()

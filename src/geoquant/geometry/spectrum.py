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
    """How singular values and the `leading` right singular vectors move.

    By the Gram matrix of the shorter side: ten times as fast as a singular value decomposition of a wide matrix, and
    values below 1e-8 of the largest, which it blurs, weigh nothing here.
    """
    (s, v), (t, w) = (_singular(matrix.double(), leading) for matrix in (before, after))
    p, q = (x.square() / x.square().sum() for x in (s, t))
    used = p > 0
    kl = (p[used] * (p[used].log() - q[used].clamp_min(1e-300).log())).sum()
    angles = principal_angles(v, w)
    ranks = effective_rank(s), effective_rank(t)
    return SpectrumChange(((t - s).norm() / s.norm()).item(), tuple(angles.tolist()), kl.item(), ranks)


def _singular(matrix: Float[Tensor, "out in"], leading: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "in k"]]:
    """Singular values, the largest first, and the leading right singular vectors as columns."""
    wide = matrix.shape[0] < matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    singular, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :leading]
    # From the left to the right ones: nearly orthogonal already, made so to the last digit.
    return singular, torch.linalg.qr(matrix.T @ vectors).Q if wide else vectors


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

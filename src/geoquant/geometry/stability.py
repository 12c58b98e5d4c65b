"""How much a metric changes from one sample of its tokens to another.

A metric that turns with the calibration text is one that codes over-fit. Both distances see ratios only: no unit of the
inputs and no basis matters, so that sites can be compared.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["affine_distance", "gaussian_kl", "ratios"]


def ratios(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Eigenvalues of `one^-1 other`, ascending. Both positive definite, or torch raises LinAlgError."""
    lower = torch.linalg.cholesky(one.double())
    half = torch.linalg.solve_triangular(lower, other.double(), upper=False)
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(lower, half.mT, upper=False))


def affine_distance(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> float:
    """Affine-invariant distance per dimension, `rms_i |log lambda_i|` of `one^-1 other`.

    Pennec, Fillard, Ayache: A Riemannian framework for tensor computing, IJCV 2006, divided by the root of n.
    """
    return ratios(one, other).log().square().mean().sqrt().item()


def gaussian_kl(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> float:
    """`KL(N(0, one) | N(0, other))` in nats per dimension."""
    found = ratios(other, one)
    return ((found - 1 - found.log()).mean() / 2).item()

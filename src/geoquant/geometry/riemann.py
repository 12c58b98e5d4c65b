"""Lengths of a change of weights in a metric that itself changes along the way, and distances of what comes out.

With a positive definite metric M (Fisher, Gauss-Newton; never the Hessian, which may be indefinite) the straight
segment from w to w + delta has the length

    L = int_0^1 sqrt(delta^T M(w + t delta) delta) dt

which is at least the geodesic distance and equals it to second order in delta. With M frozen at w it is the local
length `sqrt(delta^T M(w) delta)`, whose square is twice the quadratic loss; what M's change adds is the third-order
term, `int - local`, by Gauss-Legendre quadrature.

Between two predictions the geodesic distance of the Fisher metric is known: categorical distributions are the positive
part of a sphere of radius two, with `2 sqrt(p)` for coordinates (Rao, Information and the accuracy attainable in the
estimation of statistical parameters, 1945; Amari and Nagaoka, Methods of Information Geometry, 2000).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SegmentLength", "fisher_rao", "logit_kl", "segment_length"]

NODES = 5  # exact for polynomials of degree 9


@dataclass(frozen=True)
class SegmentLength:
    """Length of a segment: with the metric at its start throughout, and with the metric along it."""

    local: float
    length: float

    @property
    def correction(self) -> float:
        """What the change of the metric adds, relative to the local length; zero for a change of length zero."""
        return (self.length - self.local) / self.local if self.local else 0.0


def segment_length(energy: Callable[[float], float], nodes: int = NODES) -> SegmentLength:
    """Length of the segment from w to w + delta.

    energy: t to `delta^T M(w + t delta) delta`, asked once at 0 and at `nodes` points between 0 and 1.
    Raises ValueError where it is negative or no number: M was no metric.
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    squares = [energy(0.0), *(energy(float(place)) for place in (places + 1) / 2)]
    if not all(0 <= square < np.inf for square in squares):
        raise ValueError(f"a metric gives no energy below zero, but got {min(squares)}")
    lengths = np.sqrt(squares)
    return SegmentLength(float(lengths[0]), float(lengths[1:] @ weights / 2))


def fisher_rao(one: Float[Tensor, "*any classes"], other: Float[Tensor, "*any classes"]) -> Float[Tensor, "*any"]:
    """Geodesic distance of two softmax distributions in the Fisher metric, `2 arccos sum_i sqrt(p_i q_i)`, from logits.

    Between 0 and pi; to second order its square is twice the KL divergence. By the chord, `4 arcsin(|sqrt p - sqrt q|
    / 2)`, as the cosine of a small angle has no digits.
    """
    roots = [(torch.log_softmax(logits.double(), -1) / 2).exp() for logits in (one, other)]
    return 4 * ((roots[0] - roots[1]).norm(dim=-1) / 2).clamp(max=0.5**0.5).asin()


def logit_kl(one: Float[Tensor, "*any classes"], other: Float[Tensor, "*any classes"]) -> Float[Tensor, "*any"]:
    """`KL(p | q)` in nats of two softmax distributions, from logits."""
    logs, others = (torch.log_softmax(logits.double(), -1) for logits in (one, other))
    return torch.where(logs.isneginf(), 0.0, logs.exp() * (logs - others)).sum(-1)

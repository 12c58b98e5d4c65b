"""Intrinsic dimension of a cloud of points.

Two estimators that make different errors: TwoNN sees the finest scale only and is biased low in high dimensions; local
components see k neighbours and can find at most k - 1. Each is worth something beside its null (see `nulls`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.tangent import NEIGHBOURS, SHARE, frames, neighbours

__all__ = ["local_dimension", "two_nn"]


def two_nn(points: Float[Tensor, "n D"], keep: float = 0.9) -> float:
    """The dimension d for which `mu = r_2 / r_1`, the ratio of distances to the two nearest neighbours, follows
    `P(mu > x) = x^-d`.

    Facco, d'Errico, Rodriguez, Laio: Estimating the intrinsic dimension of datasets by a minimal neighborhood
    information, Scientific Reports 2017. Fitted through the origin to the `keep` smallest ratios; points with a copy
    (a distance of zero) are left out. Raises ValueError for fewer than three points without one.
    """
    near = points[neighbours(points, 2)]
    distances = (near - points[:, None]).double().norm(dim=2)
    first, second = distances[distances[:, 0] > 0].unbind(1)
    if len(first) < 3:
        raise ValueError("TwoNN needs at least three points that have no copy")
    logs = (second / first).log().sort().values
    count = len(logs)
    below = torch.arange(count, dtype=logs.dtype, device=logs.device) / count
    used = max(2, int(keep * count))
    x, y = logs[:used], -torch.log1p(-below[:used])
    return ((x * y).sum() / x.square().sum()).item()


def local_dimension(points: Float[Tensor, "n D"], k: int = NEIGHBOURS, share: float = SHARE) -> float:
    """Mean number of components that explain `share` of the variance of k neighbours."""
    return torch.cat([part.dims for part in frames(points, k, share)]).double().mean().item()

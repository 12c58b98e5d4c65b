"""Points that stand alone: local outlier factors and what density clustering leaves over.

Breunig, Kriegel, Ng, Sander: LOF, identifying density-based local outliers, SIGMOD 2000. Campello, Moulavi, Sander:
Density-based clustering based on hierarchical density estimates, PAKDD 2013. Both as scikit-learn computes them.

Rows of a weight matrix that stand alone mostly do so by their length alone: the rank correlation of factor and length
belongs to every result, and `unit` takes the lengths away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geoquant.geometry.nulls import gaussian_cloud

__all__ = ["Islands", "density_clusters", "islands", "local_outlier_factor", "rank_correlation"]

NEIGHBOURS = 20
LEVEL = 0.01
SMALLEST = 5  # points that make a cluster


@dataclass(frozen=True)
class Islands:
    """Which points stand alone, beside Gaussian clouds of the same mean and covariance.

    factor: local outlier factor, about 1 inside a cloud. p: share of the null's points that reach it, at least
    `1 / (number of them + 1)`. isolated: p at most the level, which that share of a Gaussian cloud's points has.
    lengths: Spearman correlation of factor and length about the mean; null_lengths: the same in the clouds.
    clusters, noise: how many clusters HDBSCAN finds, and the share of points in none; null_clusters, null_noise: mean
    over the clouds, which have a few small clusters by chance.
    """

    factor: Float[Tensor, " n"]
    p: Float[Tensor, " n"]
    isolated: Bool[Tensor, " n"]
    lengths: float
    null_lengths: float
    clusters: int
    noise: float
    null_clusters: float
    null_noise: float


def islands(
    points: Float[Tensor, "n D"],
    generator: torch.Generator,
    *,
    neighbours: int = NEIGHBOURS,
    smallest: int = SMALLEST,
    level: float = LEVEL,
    clouds: int = 3,
    unit: bool = False,
) -> Islands:
    """Isolation of every point. unit: of its direction from the origin, every point made as long as any other.

    Raises ValueError where there are no `neighbours` others.
    """
    points = points.double().cpu()
    if unit:
        points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-300)
    nulls = [gaussian_cloud(points, generator) for _ in range(clouds)]
    factor = local_outlier_factor(points, neighbours)
    others = [local_outlier_factor(cloud, neighbours) for cloud in nulls]
    pool = torch.cat(others).sort().values
    reached = len(pool) - torch.searchsorted(pool, factor)
    p = (1 + reached) / (len(pool) + 1)
    found = density_clusters(points, smallest)
    null_found = [density_clusters(cloud, smallest) for cloud in nulls]
    return Islands(
        factor=factor,
        p=p,
        isolated=p <= level,
        lengths=rank_correlation(factor, _lengths(points)),
        null_lengths=float(np.mean([rank_correlation(o, _lengths(c)) for o, c in zip(others, nulls)])),
        clusters=int(found.max()) + 1,
        noise=(found < 0).double().mean().item(),
        null_clusters=float(np.mean([int(one.max()) + 1 for one in null_found])),
        null_noise=float(np.mean([(one < 0).double().mean().item() for one in null_found])),
    )


def _lengths(points: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    return (points - points.mean(0)).norm(dim=1)


def local_outlier_factor(points: Float[Tensor, "n D"], neighbours: int = NEIGHBOURS) -> Float[Tensor, " n"]:
    """How much less dense a point's surroundings are than those of its neighbours; about 1 inside a cloud.

    Raises ValueError where there are no `neighbours` others.
    """
    from sklearn.neighbors import LocalOutlierFactor

    if not 0 < neighbours < len(points):
        raise ValueError(f"each of {len(points)} points has {len(points) - 1} others, not {neighbours}")
    fitted = LocalOutlierFactor(neighbours).fit(points.double().cpu().numpy())
    return torch.from_numpy(-fitted.negative_outlier_factor_)


def density_clusters(points: Float[Tensor, "n D"], smallest: int = SMALLEST) -> Int[Tensor, " n"]:
    """Cluster of each point by HDBSCAN, -1 for none."""
    from sklearn.cluster import HDBSCAN

    return torch.from_numpy(HDBSCAN(smallest, copy=True).fit_predict(points.double().cpu().numpy())).long()


def rank_correlation(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, NaN where one of them is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values.double().cpu().numpy()) for values in (one, other)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])

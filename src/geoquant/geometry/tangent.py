"""Tangent spaces of a cloud of points, by principal components of each point's nearest neighbours.

Neighbours are exact (all distances, a panel of rows at a time); the components come from the k x k Gram matrix of the
neighbours about their mean, since k is far below the dimension. A component counts as tangent until `share` of the
neighbours' variance is explained. Of any k neighbours that takes at most k - 1 components, and of an isotropic cloud
about 0.93 (k - 1) for 95%: the number says something beside that of a Gaussian cloud only (see `nulls`).

Local PCA as in Kambhatla and Leen: Dimension reduction by local principal component analysis, Neural Computation 1997.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["NEIGHBOURS", "SHARE", "Frames", "frames", "neighbours"]

NEIGHBOURS = 32
SHARE = 0.95
SPARE = 8  # candidates beyond the k
PANEL = 1 << 24  # numbers held at once, of distances and of neighbours


@dataclass(frozen=True)
class Frames:
    """Tangent spaces at b points, as combinations of their neighbours.

    points: which rows these are. centres: (b, D) means of the neighbours. offsets: (b, k, D) neighbours less their
    mean. weights: (b, k, k); row i of `weights @ offsets` is the i-th unit tangent vector, zero from `dims` on.
    """

    points: Int[Tensor, " b"]
    centres: Float[Tensor, "b D"]
    offsets: Float[Tensor, "b k D"]
    weights: Float[Tensor, "b k k"]
    dims: Int[Tensor, " b"]

    @property
    def bases(self) -> Float[Tensor, "b k D"]:
        """Orthonormal tangent vectors as rows, zero from `dims` on."""
        return self.weights @ self.offsets

    def normal_squares(self, *vectors: Float[Tensor, "b D"]) -> Float[Tensor, "v b"]:
        """Squared length of each vector's part normal to its tangent space, several at once; no basis is formed."""
        # Not a difference of squares, which would leave half the digits.
        return self.normals(torch.stack(vectors, dim=1)).square().sum(2).T

    def normals(self, rows: Float[Tensor, "b v D"]) -> Float[Tensor, "b v D"]:
        """The parts of vectors that are normal to the tangent space of their point."""
        coordinates = (rows @ self.offsets.mT) @ self.weights.mT
        return rows - (coordinates @ self.weights) @ self.offsets


def neighbours(
    points: Float[Tensor, "n D"], k: int = NEIGHBOURS, rows: Int[Tensor, " m"] | None = None
) -> Int[Tensor, "m k"]:
    """Nearest neighbours of each row, or of `rows`, the nearest first, without the row itself.

    Raises ValueError where there are no k others.
    """
    if not 0 < k < len(points):
        raise ValueError(f"each of {len(points)} points has {len(points) - 1} others, not {k}")
    rows = torch.arange(len(points), device=points.device) if rows is None else rows
    points = points - points.mean(0)  # what all have in common would only cost digits
    squares = points.square().sum(1)
    likely = min(k + SPARE, len(points) - 1)
    found = []
    for part in rows.split(max(1, PANEL // max(len(points), likely * points.shape[1]))):
        distances = torch.addmm(squares, points[part], points.T, alpha=-2.0)
        distances[torch.arange(len(part), device=points.device), part] = torch.inf
        values, near = distances.topk(likely, largest=False)
        # Where sums of squares cancel, digits are lost: there the differences decide among the likely ones.
        unsure = values[:, 0] + squares[part] < 1e-3 * squares[part]
        exact = (points[near[unsure]] - points[part[unsure], None]).square().sum(2)
        near[unsure] = near[unsure].gather(1, exact.argsort(dim=1, stable=True))
        found.append(near[:, :k])
    return torch.cat(found)


def frames(
    points: Float[Tensor, "n D"],
    k: int = NEIGHBOURS,
    share: float = SHARE,
    rows: Int[Tensor, " m"] | None = None,
) -> Iterator[Frames]:
    """Tangent spaces at every row, or at `rows`, a few hundred at a time."""
    rows = torch.arange(len(points), device=points.device) if rows is None else rows
    near = neighbours(points, k, rows)
    step = max(1, PANEL // (k * points.shape[1]))
    for part, others in zip(rows.split(step), near.split(step), strict=True):
        offsets = points[others]
        centres = offsets.mean(1)
        offsets -= centres[:, None]
        values, vectors = torch.linalg.eigh((offsets @ offsets.mT).double())
        values, vectors = values.flip(1).clamp_min(0), vectors.flip(2)
        total = values.sum(1, keepdim=True)
        # Components before the one that reaches the share, and that one.
        before = values.cumsum(1) - values
        # Rounding of single precision leaves eigenvalues of about 1e-7 of the largest, which are no directions.
        used = (before < share * total) & (values > 1e-6 * values[:, :1])
        scales = torch.where(used, values.clamp_min(1e-300).rsqrt(), 0.0)
        weights = (vectors * scales[:, None]).mT.to(points.dtype)
        yield Frames(part, centres, offsets, weights.contiguous(), used.sum(1))

"""Rows as points of a plane, for the eye, and whether labels form clusters there or among the rows themselves.

A picture is made without the labels; the figures beside it are worth what they exceed those of permuted labels by. A
label that was made from the same rows (their norm, say) is a cluster by construction and proves nothing.

Silhouette: Rousseeuw 1987. Davies-Bouldin: Davies and Bouldin 1979. t-SNE: van der Maaten and Hinton, JMLR 2008.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Clusters", "Picture", "clusters", "picture", "principal"]

MOST = 1000  # rows in a picture
COMPONENTS = 50  # before t-SNE, which would spend its time on distances
PERMUTATIONS = 99
METHODS = ("pca", "tsne")


@dataclass(frozen=True)
class Clusters:
    """How far labels form clusters, and what permuted labels reach.

    silhouette: mean over rows, 1 for clusters far apart, about 0 or below for none. davies_bouldin: below 1 for tight
    clusters. null_silhouette, null_davies_bouldin: means over permutations. p_silhouette, p_davies_bouldin: share of
    the permutations, the labels themselves counted in, that do as well. counts: rows of each label.
    """

    silhouette: float
    davies_bouldin: float
    null_silhouette: float
    null_davies_bouldin: float
    p_silhouette: float
    p_davies_bouldin: float
    counts: dict[int, int]


@dataclass(frozen=True)
class Picture:
    """Rows in a plane. explained: share of the variance that the plane holds (of t-SNE: none, NaN).

    rows: which rows are shown. seen: clusters in the plane; among: clusters of the same rows in all dimensions.
    """

    method: str
    coordinates: Float[np.ndarray, "m 2"]
    rows: Int[np.ndarray, " m"]
    explained: float
    seen: Clusters
    among: Clusters


def principal(points: Float[Tensor, "n D"], width: int) -> tuple[Float[Tensor, "n w"], Float[Tensor, "D w"], float]:
    """Coordinates in the `width` leading principal components, the components, their share of the variance.

    Signs are such that the largest entry of each component is positive. At most min(n, D) components exist.
    """
    centred = points.double() - points.double().mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    basis = vectors[:width].T
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    share = values[:width].square().sum() / values.square().sum().clamp_min(1e-300)
    return centred @ basis, basis, share.item()


def clusters(
    points: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Clusters:
    """Whether rows with the same label are closer to each other than to the rest. Features are taken as they are.

    Raises ValueError for fewer than two labels, or as many as rows.
    """
    from sklearn.metrics import davies_bouldin_score, pairwise_distances, silhouette_score

    kinds, counts = np.unique(labels, return_counts=True)
    if not 2 <= len(kinds) < len(labels):
        raise ValueError(f"clusters need two labels at least and more rows than labels, but got {len(kinds)} labels")
    distances = pairwise_distances(points)
    np.fill_diagonal(distances, 0.0)
    generator = np.random.default_rng(seed)

    def judged(given: np.ndarray) -> tuple[float, float]:
        silhouette = silhouette_score(distances, given, metric="precomputed")
        return float(silhouette), float(davies_bouldin_score(points, given))

    silhouette, bouldin = judged(labels)
    null = np.array([judged(generator.permutation(labels)) for _ in range(permutations)])
    return Clusters(
        silhouette=silhouette,
        davies_bouldin=bouldin,
        null_silhouette=float(null[:, 0].mean()),
        null_davies_bouldin=float(null[:, 1].mean()),
        p_silhouette=float((1 + (null[:, 0] >= silhouette).sum()) / (permutations + 1)),
        p_davies_bouldin=float((1 + (null[:, 1] <= bouldin).sum()) / (permutations + 1)),
        counts=dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
    )


def picture(
    points: Float[Tensor, "n D"],
    labels: Int[np.ndarray, " n"],
    method: str = "pca",
    *,
    most: int = MOST,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Picture:
    """Coordinates of the rows, or of `most` random ones, in a plane, and how far the labels form clusters.

    method: `pca`, or `tsne` (of the 50 leading components, perplexity 30 or a quarter of the rows, started from PCA).
    Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"a picture is made by one of {METHODS}, but got {method!r}")
    rows = np.sort(np.random.default_rng(seed).permutation(len(points))[:most])
    chosen, kinds = points[torch.from_numpy(rows)].detach().double().cpu(), np.asarray(labels)[rows]
    if method == "pca":
        coordinates, _, explained = principal(chosen, 2)
        plane = coordinates.numpy()
    else:
        from sklearn.manifold import TSNE

        wide, _, _ = principal(chosen, COMPONENTS)
        plane = TSNE(perplexity=min(30.0, len(rows) / 4), init="pca", random_state=seed).fit_transform(wide.numpy())
        plane, explained = plane.astype(np.float64), float("nan")
    judge = {"permutations": permutations, "seed": seed}
    seen, among = clusters(plane, kinds, **judge), clusters(chosen.numpy(), kinds, **judge)
    return Picture(method, plane, rows, explained, seen, among)

"""Are two kinds of weights apart in a space of geometric features? Judged beside permuted labels, always.

Silhouette and Davies-Bouldin describe clusters; a classifier that is judged on rows it has not seen says whether the
kinds can be told apart at all, in whatever shape. Labels that were made from the same features would make all three
circular: labels must come from interventions.

Rows that come in blocks and kinds (the layers of a model) are no independent rows: there labels are permuted so that
every block and kind keeps as many (`geometry.margins`), and folds hold whole blocks.

Rousseeuw 1987 (silhouette); Davies and Bouldin 1979; permutation of labels as in Ojala and Garriga: Permutation tests
for studying classifier performance, JMLR 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from geoquant.geometry.margins import relabelled

__all__ = ["Separability", "separability"]

FOLDS = 5


@dataclass(frozen=True)
class Separability:
    """How far apart two kinds of rows are.

    silhouette: mean over rows, 1 for clusters far apart, about 0 for none. davies_bouldin: below 1 for tight clusters.
    auc: held out, of a `linear` classifier and of `neighbours`, which follows any border. p: share of the permutations
    of the labels that reach as much, by the same names and `silhouette`; at least `1 / (permutations + 1)`.
    chance: mean of each over the permutations; where these keep blocks and kinds, what block and kind alone tell.
    rows: without and with the label.
    """

    silhouette: float
    davies_bouldin: float
    auc: dict[str, float]
    p: dict[str, float]
    chance: dict[str, float]
    rows: tuple[int, int]


def separability(
    features: Float[np.ndarray, "n f"],
    labels: Bool[np.ndarray, " n"],
    *,
    blocks: Sequence[object] | None = None,
    kinds: Sequence[object] | None = None,
    permutations: int = 99,
    seed: int = 0,
) -> Separability:
    """How far apart rows with and without the label are. Features are standardised.

    blocks, kinds: of each row, both or neither; rows of neither are exchanged freely. Raises ValueError where either
    side of the label has fewer rows than folds, or a feature is no number.
    """
    from sklearn.metrics import davies_bouldin_score, pairwise_distances, silhouette_score
    from sklearn.preprocessing import StandardScaler

    counts = int((~labels).sum()), int(labels.sum())
    if min(counts) < FOLDS:
        raise ValueError(f"each kind needs at least {FOLDS} rows, but got {counts}")
    if not np.isfinite(features).all():
        raise ValueError("a feature is not a number")
    points = StandardScaler().fit_transform(features)
    distances = pairwise_distances(points)
    generator = np.random.default_rng(seed)
    if blocks is None:
        folds, dealt = None, (generator.permutation(labels) for _ in range(permutations))
    else:
        folds, dealt = _whole_blocks(blocks, generator), relabelled(labels, blocks, kinds, permutations, generator)

    def judged(kinds: np.ndarray) -> dict[str, float]:
        found = {name: _auc(name, points, kinds, seed, folds) for name in ("linear", "neighbours")}
        return found | {"silhouette": float(silhouette_score(distances, kinds, metric="precomputed"))}

    found = judged(labels)
    others = [judged(one) for one in dealt]
    p = {name: (1 + sum(o[name] >= value for o in others)) / (permutations + 1) for name, value in found.items()}
    chance = {name: float(np.mean([o[name] for o in others])) for name in found}
    silhouette = found.pop("silhouette")
    return Separability(silhouette, float(davies_bouldin_score(points, labels)), found, p, chance, counts)


def _whole_blocks(blocks: Sequence[object], generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    """The fold of each row: blocks are dealt out at random, as many to each fold as there are."""
    names, places = np.unique([str(one) for one in blocks], return_inverse=True)
    if len(names) < 2:
        raise ValueError("rows of one block: none could be held out")
    return (generator.permutation(len(names)) % FOLDS)[places]


def _auc(name: str, points: np.ndarray, labels: np.ndarray, seed: int, folds: np.ndarray | None) -> float:
    """Held-out AUC of a logistic regression or of the nearest neighbours, over one cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    nearest = max(3, round(len(points) ** 0.5 / 2))
    model = LogisticRegression(class_weight="balanced") if name == "linear" else KNeighborsClassifier(nearest)
    if folds is None:
        free = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        chances = cross_val_predict(model, points, labels, cv=free, method="predict_proba")[:, 1]
    else:
        chances = np.full(len(labels), 0.5)  # of rows that nothing was learned for: all others are of one kind
        for fold in np.unique(folds):
            rest = folds != fold
            if 0 < labels[rest].sum() < rest.sum():
                chances[~rest] = model.fit(points[rest], labels[rest]).predict_proba(points[~rest])[:, 1]
    return float(roc_auc_score(labels, chances))

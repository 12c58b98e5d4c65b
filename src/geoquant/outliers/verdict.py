"""Can geometry tell what interventions found? The held-out verdict on geometric separability.

Labels come from interventions alone (taxonomy.py) and features from weights and moments alone, so neither knows the
other. Two questions are asked: functional or not, sensitive or not. Each is judged by classifiers on blocks that they
have not seen, against labels that are permuted among layers of the same blocks and kinds (geometry/separability.py):
layers of a block are alike, and layers of a kind, and whatever depth and kind tell is no finding of geometry. p-values
are Holm-corrected over classifiers and questions. The sentence is given whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from geoquant.geometry.separability import FOLDS, Separability, separability
from geoquant.outliers.taxonomy import BOTH, FUNCTIONAL, NEITHER, SENSITIVE
from geoquant.privacy.statistics import holm

__all__ = ["Question", "Verdict", "verdict"]

QUESTIONS = (FUNCTIONAL, SENSITIVE)
CLASSIFIERS = 2  # of separability
LEVEL = 0.05


@dataclass(frozen=True)
class Question:
    """Whether features tell groups with the label from those without.

    rows: without and with it. found: None where they are too few to ask. best: the classifier with the smallest
    p-value, then the larger held-out AUC. p: of that one, corrected. placed: whether labels were permuted among rows of
    the same blocks and kinds.
    """

    label: str
    rows: tuple[int, int]
    found: Separability | None = None
    best: str | None = None
    p: float | None = None
    placed: bool = False

    @property
    def sentence(self) -> str:
        """The answer in words."""
        without, having = self.rows
        counts = f"{having} of {without + having} groups are {self.label}"
        if self.found is None and min(self.rows) >= FOLDS:
            return f"not enough to tell: {counts}, but no feature varies among them"
        if self.found is None:
            return f"not enough to tell: {counts}, and {FOLDS} of either kind are needed"
        auc = self.found.auc[self.best]
        tells = "tells them apart" if self.p <= LEVEL and auc > 0.5 else "does not tell them apart"
        tells += " beyond block and kind" if self.placed else ""
        beyond = f", by block and kind alone {self.found.chance[self.best]:.2f}" if self.placed else ""
        return f"{counts}, and geometry {tells}: held-out AUC {auc:.2f} ({self.best}{beyond}), p = {self.p:.2g}"


@dataclass(frozen=True)
class Verdict:
    """The answers to both questions; left: groups that were left out since a feature of theirs is no number."""

    questions: tuple[Question, ...]
    features: tuple[str, ...]
    left: int = 0

    @property
    def sentence(self) -> str:
        """Both answers in words."""
        left = f" ({self.left} groups without all features left out)" if self.left else ""
        return "; ".join(question.sentence for question in self.questions) + left


def verdict(
    features: Float[np.ndarray, "n f"],
    labels: Sequence[str],
    names: Sequence[str],
    *,
    blocks: Sequence[object] | None = None,
    kinds: Sequence[object] | None = None,
    permutations: int = 99,
    seed: int = 0,
) -> Verdict:
    """Judge `features` (a row per group, a column per name) by `labels` (functional, sensitive, both, neither).

    blocks, kinds: of each group; without them groups are exchanged freely. Groups with a feature that is no number are
    left out, features that are the same everywhere too. Raises ValueError for shapes that do not fit, an unknown label,
    and too few permutations to reach significance at all.
    """
    values = np.asarray(features, float)
    if values.ndim != 2 or values.shape != (len(labels), len(names)):
        raise ValueError(f"features of shape {values.shape} for {len(labels)} labels and {len(names)} names")
    if unknown := set(labels) - {FUNCTIONAL, SENSITIVE, BOTH, NEITHER}:
        raise ValueError(f"unknown labels {sorted(unknown)}")
    usable = np.isfinite(values).all(1)
    kept = [label for label, use in zip(labels, usable) if use]
    places = {}
    if blocks is not None:
        given = {"blocks": blocks, "kinds": kinds}
        places = {name: [one for one, use in zip(own, usable) if use] for name, own in given.items()}
    values = values[usable]
    varied = values.std(0) > 0 if len(values) else np.zeros(len(names), bool)
    marks = {label: np.array([one in (label, BOTH) for one in kept], dtype=bool) for label in QUESTIONS}
    rows = {label: (int((~mark).sum()), int(mark.sum())) for label, mark in marks.items()}
    asked = [label for label in QUESTIONS if min(rows[label]) >= FOLDS and varied.any()]
    wanted = round(len(asked) * CLASSIFIERS / LEVEL) - 1
    if permutations < wanted:
        raise ValueError(f"{permutations} permutations, wanted at least {wanted}")
    judged = {
        label: separability(values[:, varied], marks[label], **places, permutations=permutations, seed=seed)
        for label in asked
    }
    # Only the classifiers: silhouette describes, it does not predict.
    tried = [(label, name) for label, one in judged.items() for name in one.auc]
    corrected = dict(zip(tried, holm([judged[label].p[name] for label, name in tried]))) if tried else {}
    questions = []
    for label in QUESTIONS:
        if label not in judged:
            questions.append(Question(label, rows[label]))
            continue
        auc = judged[label].auc
        best = min(auc, key=lambda name: (corrected[label, name], -auc[name]))
        questions.append(Question(label, rows[label], judged[label], best, corrected[label, best], bool(places)))
    return Verdict(tuple(questions), tuple(n for n, use in zip(names, varied) if use), int((~usable).sum()))

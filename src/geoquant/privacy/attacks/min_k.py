"""Min-K% Prob: an unseen text holds a few tokens that surprise the model; a seen one does not.

    score = mean of log p(x_t) over the k = 20% least likely tokens of the record (at least one)

Shi et al.: Detecting Pretraining Data from Large Language Models, ICLR 2024 (arXiv:2310.16789).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.evidence import Evidence
from geoquant.privacy.scores import RecordScores

__all__ = ["lowest_mean", "score"]

SHARE = 0.2


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean log-probability of each record's least likely 20% of tokens."""
    return lowest_mean(evidence.target, evidence.target.log_prob)


def lowest_mean(scores: RecordScores, values: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " n"]:
    """Mean of the lowest 20% (at least one) of a per-token quantity in each record; -inf where there is no token."""
    # Records in order, tokens within a record from lowest to highest: one sort for all.
    owner = np.repeat(np.arange(len(scores)), scores.lengths)
    values = values[np.lexsort((values, owner))]
    taken = np.maximum(1, (SHARE * scores.lengths + 1e-9).astype(np.int64))
    place = np.arange(len(values)) - np.repeat(scores.splits[:-1], scores.lengths)
    sums = scores.record_sums(np.where(place < np.repeat(taken, scores.lengths), values, 0.0))
    return np.where(scores.lengths > 0, sums / taken, -np.inf)

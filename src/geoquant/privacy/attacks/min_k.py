"""Min-K% Prob: an unseen text holds a few tokens that surprise the model; a seen one does not.

    score = mean of log p(x_t) over the k = 20% least likely tokens of the record (at least one)

Shi et al.: Detecting Pretraining Data from Large Language Models, ICLR 2024 (arXiv:2310.16789).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.scores import RecordScores

__all__ = ["score"]

SHARE = 0.2


def score(target: RecordScores, reference: RecordScores | None = None) -> Float[np.ndarray, " n"]:
    """Mean log-probability of each record's least likely 20% of tokens."""
    # Records in order, tokens within a record from least to most likely: one sort for all.
    owner = np.repeat(np.arange(len(target)), target.lengths)
    values = target.log_prob[np.lexsort((target.log_prob, owner))]
    taken = np.maximum(1, (SHARE * target.lengths + 1e-9).astype(np.int64))
    place = np.arange(len(values)) - np.repeat(target.splits[:-1], target.lengths)
    sums = target.record_sums(np.where(place < np.repeat(taken, target.lengths), values, 0.0))
    return np.where(target.lengths > 0, sums / taken, -np.inf)

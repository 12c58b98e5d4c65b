"""Loss attack: a record the model predicts well was in its training data.

    score = mean_t log p(x_t)

Yeom, Giacomelli, Fredrikson, Jha: Privacy Risk in Machine Learning, CSF 2018 (arXiv:1709.01604).
Easy texts score high whether or not they were seen.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.evidence import Evidence

__all__ = ["score"]


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean log-probability of the true tokens of each record."""
    target = evidence.target
    lengths = target.lengths
    return np.where(lengths > 0, target.record_sums(target.log_prob) / np.maximum(lengths, 1), -np.inf)

"""Min-K%++: Min-K%, each token compared with what the model expected of its place.

    z_t   = (log p(x_t) - mean_t) / std_t,  mean and standard deviation of log p(z) over the vocabulary, z ~ p
    score = mean of z_t over the k = 20% lowest tokens of the record (at least one)

A rare token where the model is undecided is no surprise; the same probability where it was sure is one.
Zhang et al.: Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models, ICLR 2025
(arXiv:2404.02936).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.attacks.min_k import lowest_mean
from geoquant.privacy.evidence import Evidence

__all__ = ["score"]

SMALLEST_STD = 1e-4  # below, the distribution is one token for float32, and the quotient is rounding


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean of each record's lowest 20% of standardised log-probabilities."""
    target = evidence.target
    surprise = target.log_prob.astype(np.float64) - target.mean
    return lowest_mean(target, surprise / np.maximum(target.std, SMALLEST_STD))

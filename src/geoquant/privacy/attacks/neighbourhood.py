"""Neighbourhood attack: a text that was seen is better predicted than its neighbours, a text that was not is no better.

    score = mean_t log p(x_t) - mean over the neighbours of the same

Mattern, Mireshghallah, Jin, Schoelkopf, Sachan, Berg-Kirkpatrick: Membership Inference Attacks against Language Models
via Neighbourhood Comparison, ACL 2023 Findings (arXiv:2305.18462), where a second, masked model makes a hundred
neighbours, each scored by a pass of its own.

**Here the audited model makes all neighbours, and no pass is needed.** A neighbour has each of its tokens redrawn by
the model at its place, given the true tokens before it; it is scored there, behind those. The mean over all such
neighbours is exact: at place t it is sum_z p(z) log p(z), which the pass over the text has already given. So Bao, Zhao,
Teng, Yang, Zhang (Fast-DetectGPT, ICLR 2024, arXiv:2310.05130) made the perturbations of DetectGPT a closed form.
Unseen text drawn from the model itself scores 0 on average, however hard it is to predict.

What replaced tokens do to the prediction of those behind them is left out. Neighbours scored in full have it, and
separate worse than the loss attack at several times the cost of the whole audit (benchmarks/attacks.py --neighbours):
a model that reads from left to right has not read what stands behind the word that it proposes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.privacy.evidence import Evidence

__all__ = ["score"]


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean log-probability of each record's tokens less that of its redrawn neighbours, in nats per token."""
    target = evidence.target
    lengths = target.lengths
    gain = target.record_sums(target.log_prob.astype(np.float64) - target.mean)
    return np.where(lengths > 0, gain / np.maximum(lengths, 1), -np.inf)

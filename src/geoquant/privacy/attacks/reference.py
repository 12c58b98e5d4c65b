"""Reference attack: a record that the model predicts better than its public base does was in its training
data.

    score = mean_t [ log p_target(x_t) - log p_reference(x_t) ]

Carlini et al.: Extracting Training Data from Large Language Models, USENIX Security 2021 (arXiv:2012.07805);
Watson et al.: On the Importance of Difficulty Calibration in Membership Inference Attacks, ICLR 2022
(arXiv:2111.08440). What makes a text easy for everyone cancels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.errors import UserError
from geoquant.privacy.evidence import Evidence

__all__ = ["score"]


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean log-likelihood ratio per token of each record.

    Raises UserError without a reference, or when the two models do not cut the records into the same tokens.
    """
    target, reference = evidence.target, evidence.reference
    if reference is None:
        raise UserError("the reference attack needs a reference model", fix="add --reference MODEL (the public base)")
    same = np.array_equal(target.splits, reference.splits) and np.array_equal(target.ends, reference.ends)
    if not same:
        raise UserError(
            "the reference model cuts the records into other tokens than the audited model",
            wanted="a reference with the same tokenizer",
            fix="give the base model of the fine-tune as --reference",
        )
    lengths = target.lengths
    gain = target.record_sums(target.log_prob.astype(np.float64) - reference.log_prob)
    return np.where(lengths > 0, gain / np.maximum(lengths, 1), -np.inf)

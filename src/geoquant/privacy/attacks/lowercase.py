"""Lowercase attack: what was memorised was memorised as it is written; who only knows the language minds case less.

    score = mean_t log p(x_t) - mean_t log p(lower(x)_t)

the log of the ratio of the perplexities of the record in lower case and as it stands. Carlini et al.: Extracting
Training Data from Large Language Models, USENIX Security 2021 (arXiv:2012.07805). A record without capitals scores 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.errors import UserError
from geoquant.privacy.attacks import loss
from geoquant.privacy.evidence import Evidence

__all__ = ["score"]


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Gain in mean log-probability over the record in lower case. Raises UserError when that was not scored."""
    if evidence.lowered is None:
        raise UserError("the lowercase attack needs scores of the records in lower case", fix="score the split again")
    written, lowered = loss.score(evidence), loss.score(Evidence(evidence.lowered))
    # Where either side has no tokens there is nothing to compare.
    known = np.isfinite(written) & np.isfinite(lowered)
    return np.where(known, written - np.where(known, lowered, 0.0), -np.inf)

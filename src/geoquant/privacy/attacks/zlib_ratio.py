"""zlib attack: a record that the model predicts well although zlib finds little repetition in it was seen.

    score = mean_t log p(x_t) / (bytes of the text compressed by zlib)

Carlini et al.: Extracting Training Data from Large Language Models, USENIX Security 2021 (arXiv:2012.07805), as in
the authors' code: the log of the perplexity, a mean, over the bytes of the whole text. The score is negative, so
among records predicted equally well the longer and less repetitive one counts as the likelier member.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.errors import UserError
from geoquant.privacy.attacks import loss
from geoquant.privacy.evidence import Evidence

__all__ = ["score"]


def score(evidence: Evidence) -> Float[np.ndarray, " n"]:
    """Mean log-probability per byte of zlib. Raises UserError when the texts were not gathered."""
    if evidence.zlib_bytes is None:
        raise UserError("the zlib attack needs the texts of the records", fix="gather the evidence from records")
    return loss.score(evidence) / evidence.zlib_bytes

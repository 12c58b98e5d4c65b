"""Both sides as one pool, for attacks that learn something from the other records.

Whatever such an attack learns (a spread, a population, a quantile) it learns once, for members and non-members
together: learned for each side apart, it could differ between them without the model having remembered anything.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from geoquant.errors import UserError
from geoquant.privacy.attacks import loss
from geoquant.privacy.evidence import Evidence, ShadowScores

__all__ = ["Sides", "apart", "pooled", "pooled_shadows"]

Sides = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]  # scores of members and of non-members


def pooled(members: Evidence, nonmembers: Evidence) -> Float[np.ndarray, " n+m"]:
    """Mean log-probability per token (nats) of all records under the audited model, members first."""
    return np.concatenate([loss.score(members), loss.score(nonmembers)])


def pooled_shadows(members: Evidence, nonmembers: Evidence) -> ShadowScores:
    """All records under the shadow models, members first.

    Raises UserError where there are no shadow models, or they cut the records into other tokens.
    """
    sides = [(side.target, side.shadows) for side in (members, nonmembers)]
    if any(shadows is None for _, shadows in sides):
        raise UserError("this attack needs shadow models", fix="add --train-shadows N")
    if not all(np.array_equal(target.lengths, shadows.lengths) for target, shadows in sides):
        raise UserError(
            "the shadow models cut the records into other tokens than the audited model",
            wanted="shadow models of its own base",
            fix="give the base model of the fine-tune as --reference",
        )
    one, other = (shadows for _, shadows in sides)
    return ShadowScores(
        np.concatenate([one.mean_log_prob, other.mean_log_prob], axis=1),
        np.concatenate([one.inside, other.inside], axis=1),
        np.concatenate([one.lengths, other.lengths]),
    )


def apart(values: Float[np.ndarray, " n+m"], members: Evidence) -> Sides:
    """The pool's values as those of members and of non-members."""
    count = len(members.target)
    return values[:count], values[count:]

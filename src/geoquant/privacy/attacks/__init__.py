"""Membership attacks: one file each, one contract.

    score(target: RecordScores, reference: RecordScores | None) -> (n,) array, higher = more likely a member

`reference` holds the scores of the same records under a model that never saw them (the public base). A record
without scored tokens gets the score -inf: nothing speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geoquant.privacy.attacks import loss, min_k, reference
from geoquant.privacy.scores import RecordScores

__all__ = ["ATTACKS", "Attack"]


@dataclass(frozen=True)
class Attack:
    """A membership score and whether it cannot do without the scores of a reference model."""

    score: Callable[[RecordScores, RecordScores | None], np.ndarray]
    needs_reference: bool = False


ATTACKS = {
    "loss": Attack(loss.score),
    "reference": Attack(reference.score, needs_reference=True),
    "min-k": Attack(min_k.score),
}

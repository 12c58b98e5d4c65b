"""Membership attacks: one file each, one contract.

    score(evidence: Evidence) -> (n,) array, higher = more likely a member

An attack says which parts of the evidence it cannot do without (see privacy/evidence.py). A record without scored
tokens gets the score -inf: nothing speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geoquant.privacy.attacks import loss, lowercase, min_k, min_k_plus_plus, reference, zlib_ratio
from geoquant.privacy.evidence import Evidence

__all__ = ["ATTACKS", "Attack"]


@dataclass(frozen=True)
class Attack:
    """A membership score, and the fields of the evidence beyond the target's scores that it needs."""

    score: Callable[[Evidence], np.ndarray]
    needs: tuple[str, ...] = ()

    def possible(self, evidence: Evidence) -> bool:
        """Whether all that it needs was gathered."""
        return all(getattr(evidence, name) is not None for name in self.needs)


ATTACKS = {
    "loss": Attack(loss.score),
    "reference": Attack(reference.score, needs=("reference",)),
    "zlib": Attack(zlib_ratio.score, needs=("zlib_bytes",)),
    "lowercase": Attack(lowercase.score, needs=("lowered",)),
    "min-k": Attack(min_k.score),
    "min-k++": Attack(min_k_plus_plus.score),
}

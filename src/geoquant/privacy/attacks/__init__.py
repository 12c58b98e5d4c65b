"""Membership attacks: one file each, one of two contracts.

    score(evidence) -> (n,) array                           ATTACKS: looks at one record at a time
    joint(members, nonmembers) -> two arrays, (n,), (m,)    JOINT: learns something from the other records

Higher = more likely a member. An attack says which parts of the evidence it cannot do without (see
privacy/evidence.py). A record without scored tokens gets the score -inf: nothing speaks for it. `membership_scores`
runs all that the evidence allows; attacks/combined.py makes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geoquant.privacy.attacks import (
    lira,
    loss,
    lowercase,
    min_k,
    min_k_plus_plus,
    neighbourhood,
    quantile,
    reference,
    rmia,
    zlib_ratio,
)
from geoquant.privacy.attacks.pool import Sides
from geoquant.privacy.evidence import Evidence

__all__ = ["ATTACKS", "JOINT", "Attack", "Joint", "membership_scores"]


@dataclass(frozen=True)
class Attack:
    """A membership score, and the fields of the evidence beyond the target's scores that it needs."""

    score: Callable[[Evidence], np.ndarray]
    needs: tuple[str, ...] = ()

    def possible(self, evidence: Evidence) -> bool:
        """Whether all that it needs was gathered."""
        return all(getattr(evidence, name) is not None for name in self.needs)


@dataclass(frozen=True)
class Joint:
    """Membership scores of both sides of a split, learned from both; `least`: non-members with scored tokens."""

    score: Callable[[Evidence, Evidence], Sides]
    needs: tuple[str, ...] = ()
    least: int = 2

    def possible(self, members: Evidence, nonmembers: Evidence) -> bool:
        """Whether all that it needs was gathered of both sides, and the non-members are enough."""
        gathered = all(getattr(side, name) is not None for side in (members, nonmembers) for name in self.needs)
        return gathered and int((nonmembers.target.lengths > 0).sum()) >= self.least


ATTACKS = {
    "loss": Attack(loss.score),
    "reference": Attack(reference.score, needs=("reference",)),
    "zlib": Attack(zlib_ratio.score, needs=("zlib_bytes",)),
    "lowercase": Attack(lowercase.score, needs=("lowered",)),
    "min-k": Attack(min_k.score),
    "min-k++": Attack(min_k_plus_plus.score),
    "neighbourhood": Attack(neighbourhood.score),
}

JOINT = {
    "lira": Joint(lira.joint, needs=("shadows",)),
    "rmia": Joint(rmia.joint, needs=("shadows",)),
    "quantile": Joint(quantile.joint, needs=("reference", "zlib_bytes"), least=quantile.LEAST),
}


def membership_scores(members: Evidence, nonmembers: Evidence) -> dict[str, Sides]:
    """Scores of both sides under every attack that the evidence allows, by name, in the order of the lists above."""
    single = {
        name: (attack.score(members), attack.score(nonmembers))
        for name, attack in ATTACKS.items()
        if attack.possible(members) and attack.possible(nonmembers)
    }
    return single | {n: a.score(members, nonmembers) for n, a in JOINT.items() if a.possible(members, nonmembers)}

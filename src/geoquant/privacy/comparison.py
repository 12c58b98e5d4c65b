"""Did an attack become weaker or stronger from one model to the next? Compared on the same records.

DeLong's paired test for each attack that was run on both models, Holm's correction over these attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from geoquant.privacy.delong import Difference, paired_difference
from geoquant.privacy.outcome import AttackResult
from geoquant.privacy.statistics import holm

__all__ = ["Comparison", "compare_subjects"]


@dataclass(frozen=True)
class Comparison:
    """The change of one attack's AUC from subject `first` to subject `second`, `p_holm` corrected over attacks."""

    attack: str
    first: str
    second: str
    difference: Difference
    p_holm: float

    def to_dict(self, verdict: bool) -> dict:
        """The entry of report.json; without p-values where no verdict may be given."""
        return {
            "attack": self.attack,
            "from": self.first,
            "to": self.second,
            "difference": self.difference.value,
            "ci": list(self.difference.ci),
            "z": self.difference.z if verdict else None,
            "p": self.difference.p if verdict else None,
            "p_holm": self.p_holm if verdict else None,
        }


def compare_subjects(subjects: Sequence[Sequence[AttackResult]]) -> tuple[Comparison, ...]:
    """Each subject with the one before it (base, original, quantized): attacks of each, on the same records."""
    found = []
    for before, after in pairwise(subjects):
        earlier = {result.name: result for result in before}
        both = [(earlier[result.name], result) for result in after if result.name in earlier]
        differences = [paired_difference(first.scores, second.scores) for first, second in both]
        corrected = holm([difference.p for difference in differences])
        found += [
            Comparison(first.name, first.subject, second.subject, difference, p)
            for (first, second), difference, p in zip(both, differences, corrected, strict=True)
        ]
    return tuple(found)

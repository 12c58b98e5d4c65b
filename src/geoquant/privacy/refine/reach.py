"""How far an update goes: a trust region on the objective.

An update goes down the slope so far that the objective would fall by a share `gain` of itself if it were linear. Along
a line down a parabola's slope half of what is promised is won at the lowest point: where it was more, the next update
goes further, where less, not so far, and one that did harm is taken back and a shorter one tried.

Conn, Gould, Toint: Trust-Region Methods, 2000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Reach"]

FURTHER, NEARER, HARM = 2.0, 0.7, 0.4


@dataclass(frozen=True)
class Reach:
    """gain: share of the objective. slope: squared length of its slope in the last pass; 0 before any.

    lengths: of the last update, by stage. back: it did harm, and the next pass looks again at where it had started.
    """

    gain: float
    slope: float = 0.0
    lengths: Mapping[str, float] = field(default_factory=dict)
    back: bool = False

    def judged(self, before: float, now: float) -> Reach:
        """The reach of the next update, after one that brought the objective from `before` to `now`."""
        won = (before - now) / before if before > 0 else 0.0
        if not won > 0:  # or no number
            return replace(self, gain=self.gain * HARM, back=True)
        return replace(self, gain=self.gain * (FURTHER if won >= self.gain / 2 else NEARER), back=False)

    def length(self, total: float, slope: float) -> float:
        """By what the slope is multiplied; nothing moves where there is none."""
        return self.gain * total / slope if slope > 0 else 0.0

    def undone(self, stage: str) -> float:
        """The length of an update that did harm, by which the stage's latents are still too far."""
        return self.lengths.get(stage, 0.0) if self.back else 0.0

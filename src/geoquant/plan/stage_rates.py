"""Rates that a plan has decided, met stage by stage while the model is solved.

The step of a stage is where its forecast, corrected by the misses of the stages before it (plan/rate.py), has its rate.
A stage whose codes then cost another rate is solved again at the step that its own miss points to: unlike the whole of
a model, a stage has no others that make up for it. What the stages before cost too much or too little is left to the
rest, a small share of their rate at most, so that the whole has the size that was planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from geoquant.plan.rate import SLACK, RateControl
from geoquant.plan.rounding import log2_step_at

__all__ = ["NEAR", "StageRates"]

NEAR = 0.005  # share of its rate by which a stage may miss what it aims at, and by which it aims beside its rate
TRIES = 4  # solutions of a stage at most
FLATTEST, STEEPEST = 0.3, 1.5  # bits per octave of the step


@dataclass
class StageRates(RateControl):
    """rates: of every stage, bits per weight: codes and the bytes beside them; `target` is their mean over weights."""

    rates: Mapping[str, float] = field(default_factory=dict)

    def aim(self, name: str) -> float:
        """Bits per weight to aim at: the stage's rate, and its part of what the stages before left or owe."""
        planned = {stage: rate * self.forecasts[stage].weights for stage, rate in self.rates.items()}
        left = sum(planned[stage] - bits for stage, bits in self.spent.items())
        rest = sum(size for stage, size in planned.items() if stage not in self.spent)
        # As for one rate: a little lower, so that the file does not pass what was planned.
        share = (left - SLACK * sum(planned.values())) / rest
        return self.rates[name] * (1 + min(max(share, -NEAR), NEAR))

    def step(self) -> float:
        """D for the next stage, before anything of it was solved."""
        name, kind = next(one for one in self.stages if one[0] not in self.spent)
        return 2.0 ** log2_step_at(self.forecasts[name], self.aim(name) - self._correction(kind))

    def nearer(self, name: str, tried: Sequence[tuple[float, float]]) -> float | None:
        """The next step to try for a stage, or None where one was near enough or there were enough.

        tried: the steps so far and the bits per weight that they cost.
        """
        aim = self.aim(name)
        best = min(tried, key=lambda one: abs(one[1] - aim))
        if abs(best[1] - aim) <= NEAR * aim or len(tried) == TRIES:
            return None
        # A bit an octave, as where codes are many; from two sizes on what these say, on either side if there are such.
        rest = sorted((one for one in tried if one != best), key=lambda one: abs(one[1] - aim))
        across = [one for one in rest if (one[1] > aim) != (best[1] > aim)]
        slope = 1.0
        if other := next(iter(across or rest), None):
            octaves = math.log2(other[0] / best[0])
            slope = min(max((best[1] - other[1]) / octaves, FLATTEST), STEEPEST)
        return best[0] * 2.0 ** ((best[1] - aim) / slope)

"""What is kept of a measurement, a number per window, record, span, canary and question, and what changed between two.

So little is kept that it fits a line of JSON, and so much that every effect can be taken again from it: on all of the
data, or on a half (`half`), without asking the model again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from geoquant.outliers.paired import (
    AdvantageShift,
    FlipShift,
    GapShift,
    Shift,
    advantage_shift,
    flip_shift,
    gap_shift,
    shift,
)

__all__ = ["Effect", "Observed", "contrast", "half"]


@dataclass(frozen=True)
class Observed:
    """One state of a model. Sides are (members, non-members), a number per record, -inf where nothing was scored.

    windows: NLL of each window of public text; NaN where the model gives no probabilities, and then nothing else was
    measured. attacks: scores of both sides by attack, higher for members. domain: mean log-likelihood of unseen
    records. spans: (record, whether greedy decoding writes it) of members' marked spans. exposure: bits by canary.
    tasks: by task, which questions were answered rightly.
    """

    windows: tuple[float, ...]
    attacks: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    domain: tuple[float, ...] = ()
    spans: tuple[tuple[int, bool], ...] = ()
    exposure: tuple[float, ...] = ()
    tasks: dict[str, tuple[bool, ...]] = field(default_factory=dict)

    @property
    def lost(self) -> bool:
        """Whether it is no model any more."""
        return any(math.isnan(value) for value in self.windows)

    def to_dict(self) -> dict:
        """For JSON, which has no NaN and no infinity: "nan", "-inf" and "inf" stand for them."""
        return _written(asdict(self))

    @classmethod
    def from_dict(cls, kept: dict) -> Observed:
        """What `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""
        return cls(
            windows=_numbers(kept["windows"]),
            attacks={name: (_numbers(a), _numbers(b)) for name, (a, b) in kept["attacks"].items()},
            domain=_numbers(kept["domain"]),
            spans=tuple((int(record), bool(hit)) for record, hit in kept["spans"]),
            exposure=_numbers(kept["exposure"]),
            tasks={name: tuple(map(bool, hits)) for name, hits in kept["tasks"].items()},
        )


def _written(value: object) -> object:
    if isinstance(value, dict):
        return {name: _written(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Sequence[float | str]) -> tuple[float, ...]:
    return tuple(map(float, values))


def half(one: Observed, which: int) -> Observed:
    """Every second window, record, canary and question, from the first (which=0) or the second (1) on."""
    own = slice(which, None, 2)
    return Observed(
        windows=one.windows[own],
        attacks={name: (inside[own], outside[own]) for name, (inside, outside) in one.attacks.items()},
        domain=one.domain[own],
        spans=tuple(span for span in one.spans if span[0] % 2 == which),
        exposure=one.exposure[own],
        tasks={name: hits[own] for name, hits in one.tasks.items()},
    )


@dataclass(frozen=True)
class Effect:
    """What one intervention on one part (or several parts together) does; measures are those of effects.py.

    public: where the model became one that gives no probabilities (NaN), its value is infinite and nothing else was
    measured. changes: of public text, window by window. after: what was observed, for whoever takes it apart.
    """

    part: str
    intervention: str
    public: Shift
    domain: Shift | None = None
    attacks: dict[str, AdvantageShift] = field(default_factory=dict)
    gap: GapShift | None = None
    extraction: FlipShift | None = None
    exposure: Shift | None = None
    tasks: dict[str, FlipShift] = field(default_factory=dict)
    seconds: float = 0.0
    changes: tuple[float, ...] = ()
    after: Observed | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict:
        """For JSON: None stands for what is not finite. Without what was observed."""
        told = asdict(replace(self, after=None))
        del told["after"]
        return _plain(told)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def contrast(before: Observed, after: Observed, part: str = "", intervention: str = "", seconds: float = 0.0) -> Effect:
    """The paired changes between two states of one model; the rest is what they are called and what they took."""
    named = {"part": part, "intervention": intervention, "seconds": seconds, "after": after}
    if after.lost:
        lost = Shift(float(np.mean(before.windows)), math.inf, math.inf, 0.0, None, 0.0, len(before.windows))
        return Effect(public=lost, changes=(math.inf,) * len(before.windows), **named)
    sides = {
        name: [tuple(np.array(side) for side in state.attacks[name]) for state in (before, after)]
        for name in before.attacks
    }
    gap = None
    if sides:
        # A record without scored tokens has no loss.
        finest = sides["reference" if "reference" in sides else "loss"]
        gap = gap_shift(*(tuple(side[np.isfinite(side)] for side in one) for one in finest))
    written = [[hit for _, hit in state.spans] for state in (before, after)]
    return Effect(
        public=shift(np.array(before.windows), np.array(after.windows)),
        domain=_domain_shift(before, after),
        attacks={name: advantage_shift(*pair) for name, pair in sides.items()},
        gap=gap,
        extraction=flip_shift(*written) if written[0] else None,
        exposure=shift(*(np.array(state.exposure) for state in (before, after))) if before.exposure else None,
        tasks={name: flip_shift(old, after.tasks[name]) for name, old in before.tasks.items() if old},
        changes=tuple(new - old for old, new in zip(before.windows, after.windows)),
        **named,
    )


def _domain_shift(before: Observed, after: Observed) -> Shift | None:
    old, new = (-np.array(state.domain) for state in (before, after))
    scored = np.isfinite(old)
    return shift(old[scored], new[scored]) if scored.any() else None

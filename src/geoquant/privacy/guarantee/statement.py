"""The statement itself: numbers that cannot be had without what they mean.

A `Guarantee` is built of an adjacency, a mechanism and a scope, and checks that the mechanism's own accounting gives
the epsilon it claims. What is refused, always: epsilon without adjacency; for rounding, deterministic or stochastic;
where only a privately chosen subset is noised, or a tensor is outside; with a seed that somebody keeps; an attack's AUC
made into an epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from geoquant.errors import UserError
from geoquant.privacy.guarantee.adjacency import Adjacency, Inherited
from geoquant.privacy.guarantee.gaussian import check_pair
from geoquant.privacy.guarantee.noise import SOURCE, Slack, epsilon_with
from geoquant.privacy.guarantee.provenance import Spoken
from geoquant.privacy.guarantee.scope import Scope

__all__ = ["GaussianNoise", "Guarantee", "Rounding", "TrainersClaim", "epsilon_of_attack"]


@dataclass(frozen=True)
class GaussianNoise:
    """Gaussian noise on a fine public lattice; what follows (rounding, packing) only sees its result.

    sigma: standard deviation, in the units of the adjacency's norm. sensitivity: L2, in the same units, without what
    `slack` adds. of: what the noise was added to. source: of randomness; any but the operating system's is refused.
    """

    sigma: float
    sensitivity: float
    slack: Slack
    of: str
    source: str = SOURCE

    def __post_init__(self) -> None:
        if self.source != SOURCE:
            raise UserError(
                "noise that somebody can draw again protects nothing: a guarantee takes no seed and keeps none",
                got=self.source,
                wanted=SOURCE,
            )
        if not (self.sigma > 0 and self.sensitivity > 0):
            raise ValueError(f"sigma and sensitivity must be above 0, got {self.sigma} and {self.sensitivity}")

    @property
    def mu(self) -> float:
        """Sensitivity over noise, with what rounding to the lattice adds."""
        return self.sensitivity / self.sigma + self.slack.distance

    def epsilon(self, delta: float) -> float:
        """The least epsilon that holds for this delta, with everything that `slack` states."""
        return epsilon_with(self.mu, delta, self.slack)

    @property
    def words(self) -> str:
        return (
            f"Gaussian noise of standard deviation {self.sigma:.6g} added once to {self.of}, on a lattice of spacing "
            f"sigma / 2^32, from {self.source}, no seed kept; all that follows is computed from the result and from "
            f"public values (sensitivity {self.sensitivity:.6g}, {self.mu:.4f}-GDP, exact up to {self.slack.words})"
        )


@dataclass(frozen=True)
class TrainersClaim:
    """The mechanism of whoever trained the model. Their claim: what is computed from the model keeps it unchanged."""

    name: str
    who: str
    claimed_epsilon: float
    claimed_delta: float
    digest: str

    def __post_init__(self) -> None:
        for part, value in (("mechanism", self.name), ("who", self.who)):
            if not value.strip():
                raise UserError(f"an inherited guarantee must say its {part}")

    def epsilon(self, delta: float) -> float:
        return self.claimed_epsilon if delta >= self.claimed_delta else math.inf

    @property
    def words(self) -> str:
        return (
            f"{self.name}, as claimed by {self.who} (statement sha256 {self.digest[:12]}); GeoQuant did not check the "
            "training, and added nothing to the claim and took nothing from it: quantization is post-processing"
        )


@dataclass(frozen=True)
class Rounding:
    """Rounding to a grid, kept here to be refused: its epsilon is infinite at every delta that would say something.

    An output that has some odds for one weight vector is impossible for a neighbour: for rounding to nearest across a
    boundary, for stochastic rounding two steps on.
    """

    kind: str = "to nearest"
    words = "rounding"


def epsilon_of_attack(*_: object, **__: object) -> NoReturn:
    """Always refused: an attack that fails bounds nothing, since the next one may succeed."""
    raise UserError(
        "an attack's AUC is no epsilon, and no epsilon follows from it",
        fix="report the attack with its interval; a lower bound on epsilon comes from an audit of the mechanism",
    )


@dataclass(frozen=True)
class Guarantee(Spoken):
    """(epsilon, delta)-indistinguishability of what was released, for neighbours under `adjacency`."""

    epsilon: float
    delta: float
    adjacency: Adjacency
    mechanism: GaussianNoise | TrainersClaim
    scope: Scope

    def __post_init__(self) -> None:
        if not isinstance(self.adjacency, Adjacency):
            raise UserError(
                "an epsilon means nothing without its adjacency: which pairs of inputs it is about",
                got=self.adjacency,
                wanted="a weight ball, one record, or what the trainer states",
            )
        if isinstance(self.mechanism, Rounding):
            raise UserError(
                f"rounding {self.mechanism.kind} has no epsilon: what one weight may become another cannot",
                fix="add noise before rounding, and state that",
            )
        if not isinstance(self.mechanism, GaussianNoise | TrainersClaim):
            raise UserError("this is no mechanism with an accounting", got=type(self.mechanism).__name__)
        if isinstance(self.mechanism, TrainersClaim) != isinstance(self.adjacency, Inherited):
            raise UserError(
                "this adjacency does not belong to this mechanism",
                got=f"{type(self.adjacency).__name__} and {type(self.mechanism).__name__}",
            )
        if not isinstance(self.scope, Scope):
            raise UserError("a guarantee must say which tensors it covers", got=self.scope)
        self.scope.check()
        for number in (self.epsilon, self.delta):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise UserError("epsilon and delta are numbers that an accounting gives", got=type(number).__name__)
        check_pair(self.epsilon, self.delta)
        if (least := self.mechanism.epsilon(self.delta)) > self.epsilon:
            raise UserError(
                "the mechanism does not give this guarantee",
                got=f"epsilon {self.epsilon:.6g}",
                wanted=f"at least {least:.6g} at delta {self.delta:g}",
            )
        if isinstance(self.mechanism, GaussianNoise) and self.mechanism.sensitivity < self.adjacency.sensitivity:
            raise UserError(
                "the noise was measured for neighbours that are closer than these",
                got=f"sensitivity {self.mechanism.sensitivity:.6g}",
                wanted=f"at least {self.adjacency.sensitivity:.6g}",
            )

    @property
    def sentence(self) -> str:
        """All of it, in words. There is no shorter form."""
        inherited = isinstance(self.adjacency, Inherited)
        about = f"what {self.mechanism.who} calls neighbours" if inherited else "neighbours"
        return (
            f"({self.epsilon:g}, {self.delta:g})-indistinguishable for {about}: {self.adjacency.words}. "
            f"Mechanism: {self.mechanism.words}. Covers {self.scope.words}. Does not cover: {self.not_covered}"
        )

    @property
    def not_covered(self) -> str:
        return (
            f"{self.adjacency.not_covered} Other releases from the same private data (they add to this one), settings "
            "chosen by looking at private data, and other files shipped with the model."
        )

    def to_dict(self) -> dict[str, str | float]:
        """The entry of report.json; no key of it can be left out."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "adjacency": self.adjacency.words,
            "mechanism": self.mechanism.words,
            "scope": self.scope.words,
            "not_covered": self.not_covered,
            "sentence": self.sentence,
        }

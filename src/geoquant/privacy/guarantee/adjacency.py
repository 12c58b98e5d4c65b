"""Which pairs of inputs an (epsilon, delta) makes hard to tell apart. Without it the two numbers say nothing.

weight ball: two weight vectors, a statement about weights and not about people. one record: two collections of records,
by splitting them into shards. inherited: whatever whoever trained the model says of its training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from geoquant.errors import UserError
from geoquant.privacy.guarantee.provenance import Public

__all__ = ["Adjacency", "Inherited", "Norm", "OneRecord", "WeightBall", "euclidean", "in_metric", "in_steps"]


@dataclass(frozen=True, eq=False)
class Norm:
    """`||dW||^2`, summed over all released tensors, of each tensor's change in its own public shape.

    steps: by tensor name, what its change is divided by (broadcast against it). factors: by tensor name, (in, in) upper
    triangular R; the change of a row w counts `||R w||`, so that M = R^T R is its metric. A tensor in neither counts as
    it is. words: what a reader is told.
    """

    words: str
    steps: Mapping[str, Public] = field(default_factory=dict, repr=False)
    factors: Mapping[str, Public] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, value in (*self.steps.items(), *self.factors.items()):
            if not isinstance(value, Public):
                raise TypeError(f"the shape of {name} must be a Public value, got {type(value).__name__}")
        if both := set(self.steps) & set(self.factors):
            raise ValueError(f"a tensor has steps or a factor, got both for {min(both)}")
        for name, steps in self.steps.items():
            if not bool((torch.as_tensor(steps.values) > 0).all()):
                raise UserError(f"the public steps of {name} must be above 0")


def euclidean() -> Norm:
    """L2 distance, in units of the weights."""
    return Norm("L2 distance in units of the weights")


def in_steps(steps: Mapping[str, Public]) -> Norm:
    """L2 distance in public grid steps; tensors without steps in units of the weights."""
    return Norm(f"L2 distance in grid steps taken from {_sources(steps)}", steps=dict(steps))


def in_metric(factors: Mapping[str, Public]) -> Norm:
    """Distance `sqrt(dw M dw^T)` per row, `M = R^T R` public; tensors without a factor in units of the weights.

    Damping belongs to M: it goes into the factor, and its size into the factor's source.
    """
    return Norm(
        f"distance in the metric M of the inputs of {len(factors)} matrices, from {_sources(factors)}, and L2 distance "
        "in units of the weights elsewhere",
        factors=dict(factors),
    )


def _sources(values: Mapping[str, Public]) -> str:
    if not values:
        raise ValueError("got no tensors")
    if stray := [name for name, value in values.items() if not isinstance(value, Public)]:
        raise TypeError(f"the shape of {stray[0]} must be a Public value, got {type(values[stray[0]]).__name__}")
    return " and ".join(dict.fromkeys(value.source for value in values.values()))


@dataclass(frozen=True)
class WeightBall:
    """Any two weight vectors within `radius` of each other."""

    radius: float
    norm: Norm

    def __post_init__(self) -> None:
        _length(self.radius, "the radius of a weight ball")
        if not isinstance(self.norm, Norm):
            raise TypeError(f"a weight ball needs a Norm, got {type(self.norm).__name__}")

    @property
    def sensitivity(self) -> float:
        return self.radius

    @property
    def words(self) -> str:
        return (
            f"any two weight vectors within {self.radius:g} of each other ({self.norm.words}, over all covered tensors)"
        )

    not_covered = (
        "How far one record moves the weights (this is a statement about weights, not about people), and weight "
        "vectors that are further apart."
    )


@dataclass(frozen=True)
class OneRecord:
    """Two collections that differ in one record, by sample-and-aggregate: k shards, one fine-tune of each.

    The record lies in one shard, so one change of k is another; each is clipped to norm C, so two of them are at most
    2 C apart, and the mean moves by at most 2 C / k. That holds for a replaced record and for one added or removed
    (k fixed): also then a shard's change becomes an arbitrary other one.
    """

    shards: int
    clip: float

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise UserError("there must be at least one shard", got=self.shards)
        _length(self.clip, "the clip norm of a shard's change")

    @property
    def sensitivity(self) -> float:
        return 2 * self.clip / self.shards

    @property
    def words(self) -> str:
        return (
            f"one record replaced, added or removed, which lies in one of {self.shards} disjoint shards, each a "
            f"fine-tune of the public base whose change is clipped to L2 norm {self.clip:g}"
        )

    not_covered = (
        "A person with several records; shards that overlap, records that go to a shard because of other records, and "
        "whatever of the training looked at more than one shard."
    )


@dataclass(frozen=True)
class Inherited:
    """What a trainer's own statement calls neighbours, word for word."""

    words: str

    def __post_init__(self) -> None:
        if not self.words.strip():
            raise UserError("an inherited guarantee needs its adjacency", fix="say what is added, removed or replaced")

    not_covered = "Anything that the trainer's own statement does not cover."


Adjacency = WeightBall | OneRecord | Inherited


def _length(value: float, what: str) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise UserError(f"{what} is a length", got=value, wanted="a number above 0")

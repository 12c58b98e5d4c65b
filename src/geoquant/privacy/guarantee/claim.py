"""What a run is asked to guarantee, as one value: an epsilon and its adjacency, or a trainer's own statement.

An epsilon alone is refused: it is about pairs of inputs, and says nothing until somebody says which pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from geoquant.errors import UserError

__all__ = ["DELTA", "Ball", "Claim", "Inherit", "Shards", "claim_of"]

DELTA = 1e-5


@dataclass(frozen=True)
class Ball:
    """Any two weight vectors within `radius`: in units of the weights, or in the metric of the public base's inputs."""

    epsilon: float
    delta: float
    radius: float
    shape: Literal["euclidean", "metric"]
    base: str


@dataclass(frozen=True)
class Shards:
    """One record, by fine-tunes (folders) of the public base on disjoint shards, each change clipped to norm `clip`."""

    epsilon: float
    delta: float
    folders: tuple[str, ...]
    clip: float


@dataclass(frozen=True)
class Inherit:
    """What the statement in a file says of the training."""

    statement: str


Claim = Ball | Shards | Inherit


def claim_of(
    *,
    base: str | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    radius: float | None = None,
    ball: Literal["euclidean", "metric"] | None = None,
    shards: Sequence[str] = (),
    clip: float | None = None,
    inherited: str | None = None,
) -> Claim | None:
    """The claim that these options add up to, or None where none was made. Raises UserError for parts of one."""
    ways = {"--radius": radius, "--shards": tuple(shards) or None, "--inherited": inherited}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise UserError("a run has one guarantee", got=" and ".join(chosen), fix="leave out all but one")
    if inherited is not None:
        for name, value in (("--epsilon", epsilon), ("--delta", delta), ("--ball", ball), ("--clip", clip)):
            if value is not None:
                raise UserError(
                    "the trainer's statement has its own epsilon and delta", got=name, fix=f"leave {name} out"
                )
        return Inherit(inherited)
    if epsilon is None:
        parts = {"--delta": delta, "--ball": ball, "--clip": clip} | ways
        if given := [name for name, value in parts.items() if value is not None]:
            raise UserError(f"{given[0]} is part of a guarantee", wanted="--epsilon E as well")
        return None
    if not chosen:
        raise UserError(
            f"epsilon {epsilon:g} says nothing without its adjacency: which two inputs are to be hard to tell apart",
            wanted="--radius R (two weight vectors), --shards DIR... --clip C (one record), or --inherited FILE alone",
            fix="to protect people, train with DP-SGD and give its statement by --inherited",
        )
    delta = DELTA if delta is None else delta
    if radius is not None:
        if clip is not None:
            raise UserError("--clip belongs to --shards", got="--radius", fix="leave --clip out")
        if base is None:
            raise UserError(
                "noise goes on the change from a public model, which nobody named",
                wanted="--base MODEL, the one it was fine-tuned from",
            )
        return Ball(epsilon, delta, radius, ball or "euclidean", base)
    if ball is not None:
        raise UserError("--ball belongs to --radius", got="--shards", fix="leave --ball out")
    if clip is None:
        raise UserError("a shard's change must have a length that nothing in it can exceed", wanted="--clip C")
    if base is not None:
        raise UserError("with --shards MODEL itself is the public base", got=f"--base {base}", fix="leave --base out")
    return Shards(epsilon, delta, tuple(shards), clip)

"""A published control matrix, and which points of a frontier are its counterparts.

Published: epsilon, noise in steps of the grid, rise of perplexity, and success of a membership attack (how it was
counted is not stated). No neighbours are stated, and epsilon without neighbours is no claim: noise of s steps on every
weight gives epsilon

    for any two weight vectors within  s mu(epsilon, delta)  steps of each other (L2, all weights together),

mu that of the Gaussian mechanism (privacy/guarantee/gaussian.py). Counterparts are sought twice: by the same noise, as
the frontier adds it to linear layers (which guarantees nothing, for embeddings, norms and biases stay), and by the same
epsilon, with the neighbours that our own release states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from geoquant.privacy.guarantee.gaussian import gaussian_mu

__all__ = ["DELTA", "PUBLISHED", "Published", "beside", "radius", "same_epsilon", "same_noise"]

DELTA = 1e-5  # the published matrix states none
BITS = 4  # of the grid in whose steps noise is counted


@dataclass(frozen=True)
class Published:
    """One setting as it was published. noise: in steps; rise: of perplexity; success: of the attack."""

    epsilon: float
    noise: float
    rise: float
    success: float


PUBLISHED = (
    Published(math.inf, 0.0, 0.05, 0.75),
    Published(8.0, 0.5, 0.12, 0.62),
    Published(2.0, 1.2, 0.28, 0.55),
    Published(1.0, 2.0, 0.50, 0.51),
)


def radius(setting: Published) -> float | None:
    """How far apart, in steps, two weight vectors may lie for its noise to be worth its epsilon at DELTA.

    None where it promises nothing.
    """
    return None if math.isinf(setting.epsilon) else setting.noise * gaussian_mu(setting.epsilon, DELTA)


def same_noise(setting: Published, rows: Sequence[Mapping]) -> int | None:
    """The row with as much noise, rounded to BITS bits if there is one, else as it is; without noise, BITS bits."""
    found = [
        index
        for index, row in enumerate(rows)
        if _noise(row) == setting.noise and (_boxed(row) if row["quantized"] else setting.noise > 0)
    ]
    return min(found, key=lambda index: (not rows[index]["quantized"], _method(rows[index]), index), default=None)


def same_epsilon(setting: Published, rows: Sequence[Mapping]) -> int | None:
    """The row with that epsilon under a guarantee of its own; of several the one of least loss on public text."""
    found = [
        index
        for index, row in enumerate(rows)
        if row["guarantee"] and math.isclose(row["guarantee"]["epsilon"], setting.epsilon)
    ]
    return min(found, key=lambda index: rows[index]["public"]["nll"], default=None)


def beside(rows: Sequence[Mapping], guessed: Sequence[Mapping | None]) -> list[dict]:
    """Every published setting, and what was measured of its counterparts: None where there is none.

    rows: of the control matrix, the first is the original. guessed: of every row, right guesses of the attack.
    """
    told = []
    for setting in PUBLISHED:
        endless = math.isinf(setting.epsilon)
        near, sure = same_noise(setting, rows), None if endless else same_epsilon(setting, rows)
        told.append(
            {
                # JSON has no infinity: None is that no epsilon is promised.
                "published": {**asdict(setting), "epsilon": None if endless else setting.epsilon},
                "holds_within_steps": radius(setting),
                "same_noise": None if near is None else _measured(rows[near], rows[0], guessed[near]),
                "same_epsilon": None if sure is None else _measured(rows[sure], rows[0], guessed[sure]),
            }
        )
    return told


def _measured(row: Mapping, first: Mapping, guessed: Mapping | None) -> dict:
    """One of ours. rise: of perplexity, with the standard error that the paired one of the loss comes to."""
    now, sure, change = row["public"], row["guarantee"], row["change"]
    return {
        "name": row["name"],
        "epsilon": sure and sure["epsilon"],
        "delta": sure and sure["delta"],
        "adjacency": sure and sure["adjacency"],
        "noise": change["amount"] if change else None if sure else 0.0,
        "noise_words": sure and sure.get("noise"),
        "rise": {
            "value": now["perplexity"] - first["public"]["perplexity"],
            "se": now["perplexity"] * now["delta"]["se"],
        },
        "attack": row["primary"] and {name: row["primary"][name] for name in ("name", "auc", "ci")},
        "guessed": guessed and dict(guessed),
    }


def _noise(row: Mapping) -> float | None:
    """Steps of noise on the linear layers; None where something else was done."""
    change = row["change"]
    if change is None:
        return 0.0 if row["family"] == "rounding" else None
    return change["amount"] if row["family"] == "noise" and change["kind"] == "noise" else None


def _boxed(row: Mapping) -> bool:
    return row["recipe"].get("grid", "box") == "box" and row["recipe"].get("bits") == BITS


def _method(row: Mapping) -> int:
    """To nearest first: what the publication is about."""
    return 0 if row["recipe"].get("method") == "rtn" else 1

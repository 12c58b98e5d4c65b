"""A pool of records on which the loss attack must fail: how hard a record is outweighs having been trained on.

    score under a model = difficulty of the record + effect * (the model saw it) + noise

All parts Gaussian, so that the best possible attack is known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Toy:
    target: np.ndarray  # (n,)
    member: np.ndarray  # (n,) bool
    shadow: np.ndarray  # (models, n)
    inside: np.ndarray  # (models, n) bool
    difficulty: np.ndarray  # (n,)
    effect: np.ndarray  # (n,)
    noise: np.ndarray  # (n,)


def toy(seed: int, n: int = 1000, models: int = 16, spread: float = 3.0, offset: float = 0.0, varied: bool = True):
    """n records, half of them members of the target; every record was seen by half of the shadow models."""
    rng = np.random.default_rng(seed)
    difficulty = offset + spread * rng.normal(size=n)
    noise = 0.2 + 0.6 * rng.random(n) if varied else np.full(n, 0.4)
    effect = 0.3 + 0.6 * rng.random(n) if varied else np.full(n, 0.6)
    member = rng.permutation(n) < n // 2
    inside = rng.random((models, n)).argsort(axis=0) < models // 2
    shadow = difficulty + effect * inside + noise * rng.normal(size=(models, n))
    target = difficulty + effect * member + noise * rng.normal(size=n)
    return Toy(target, member, shadow, inside, difficulty, effect, noise)

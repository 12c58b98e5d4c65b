"""Which points of a trade nothing beats, where every difference has its noise.

    i beats j  where, on some axis,  v_j - v_i > noise_ij,  and on none  v_i - v_j > noise_ij

Smaller is better on every axis. With no noise this is Pareto's order. With noise it may go round in a ring (i beats j
on one axis, j beats k on another, k beats i on a third, and elsewhere they are too close to tell): a point is then out
only if something beats it that it does not beat in turn, by itself or through others. So there is always a point left,
a ring stays or goes as a whole, and without noise nothing changes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["beats", "undominated"]


def beats(
    values: Float[np.ndarray, "points axes"], noise: Float[np.ndarray, "axes points points"]
) -> Bool[np.ndarray, "points points"]:
    """Whether point i (row) beats point j (column). noise: differences up to it count as none; symmetric.

    NaN is a value nobody measured: where one of two points lacks what the other has, neither beats the other.
    """
    gain = values.T[:, None, :] - values.T[:, :, None]  # (axes, i, j): how far i lies below j
    missing = np.isnan(values).T
    unknown = missing[:, :, None] != missing[:, None, :]
    with np.errstate(invalid="ignore"):
        better, worse = gain > noise, -gain > noise
    return better.any(axis=0) & ~(worse | unknown).any(axis=0)


def undominated(
    values: Float[np.ndarray, "points axes"], noise: Float[np.ndarray, "axes points points"]
) -> Bool[np.ndarray, " points"]:
    """Whether each point is one that nothing beats, rings aside (see above)."""
    direct = beats(values, noise)
    reached = direct.copy()
    for through in range(len(values)):  # Warshall's transitive closure
        reached |= reached[:, through, None] & reached[None, through, :]
    return ~(direct & ~reached.T).any(axis=0)

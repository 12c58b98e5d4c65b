"""What the Gaussian mechanism guarantees, exactly: no bound, no search over orders.

A value x of R^d is released as x + N(0, sigma^2 I), and neighbours lie within L2 distance Delta of each other. With
mu = Delta / sigma the pair (epsilon, delta) holds if and only if

    delta >= Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu),

in every dimension, since only the direction of the difference tells neighbours apart (Balle and Wang 2018, Theorem 8;
this is mu-GDP of Dong, Roth, Su 2022). One Gaussian over several tensors is one Gaussian over all of their weights:
squared distances add, and nothing is lost by composing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from scipy.special import erfcx, ndtr

from geoquant.errors import UserError

__all__ = ["check_pair", "composed", "gaussian_delta", "gaussian_epsilon", "gaussian_mu", "gaussian_sigma"]

LARGEST = 1e6  # of epsilon and of mu: far beyond any number that says something
HALVINGS = 200


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The smallest delta for which a mechanism of this mu is (epsilon, delta)-DP.

    With a = mu/2 - epsilon/mu and b = -mu/2 - epsilon/mu the densities satisfy `e^epsilon phi(b) = phi(a)`, so that
    delta is `exp(-a^2/2) (erfcx(-a/sqrt 2) - erfcx(-b/sqrt 2)) / 2`: the exponentials cancel on paper, not in floating
    point, and a delta of 1e-200 is as good as one of 1e-5.
    """
    if not (epsilon >= 0 and mu >= 0):
        raise ValueError(f"epsilon and mu must be at least 0, got epsilon={epsilon}, mu={mu}")
    if mu == 0:
        return 0.0
    a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    tail = float(erfcx(-b / math.sqrt(2))) / 2 * math.exp(-a * a / 2)  # e^epsilon Phi(b)
    if a > 0:
        return min(1.0, max(0.0, float(ndtr(a)) - tail))
    return max(0.0, math.exp(-a * a / 2) / 2 * float(erfcx(-a / math.sqrt(2)) - erfcx(-b / math.sqrt(2))))


def gaussian_epsilon(delta: float, mu: float) -> float:
    """The smallest epsilon for this delta, rounded up: at the returned one the pair holds."""
    check_pair(0.0, delta)
    return least(lambda epsilon: gaussian_delta(epsilon, mu) <= delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest `Delta / sigma` that is (epsilon, delta)-DP, rounded down."""
    check_pair(epsilon, delta)
    return 1 / least(lambda inverse: inverse > 0 and gaussian_delta(epsilon, 1 / inverse) <= delta)


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least noise for neighbours within L2 distance `sensitivity`, in its units."""
    if not 0 < sensitivity < math.inf:
        raise UserError("the sensitivity of a mechanism is a distance", got=sensitivity, wanted="a number above 0")
    return sensitivity / gaussian_mu(epsilon, delta)


def composed(distances: Iterable[float]) -> float:
    """The sensitivity (or mu) of all parts together: the root of the sum of squares."""
    return math.hypot(*distances)


def check_pair(epsilon: float, delta: float) -> None:
    """Raises UserError where the numbers cannot be a guarantee."""
    if not 0 <= epsilon < LARGEST:
        raise UserError("this is no epsilon", got=epsilon, wanted="a number of at least 0")
    if not 0 < delta < 1:
        raise UserError("this is no delta", got=delta, wanted="a number between 0 and 1, such as 1e-5")


def least(holds: Callable[[float], bool]) -> float:
    """The smallest x >= 0 at which a condition holds that goes on holding, rounded up to where it was seen to."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > 4 * LARGEST:
            raise UserError("no epsilon below a million holds here", fix="use more noise or a larger delta")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high

"""Concentrated differential privacy: discrete Gaussians, whose Renyi divergences are known and whose delta is not.

A mechanism is rho-zCDP if `D_alpha <= rho alpha` for every alpha > 1 between neighbours (Bun and Steinke 2016). rho
adds up over releases and over tensors.

A discrete Gaussian around a real centre x draws the integer k with probability proportional to
`exp(-(k - x)^2 / (2 sigma^2))`. With kappa(sigma) = sup_x Var(k) / sigma^2, centres at distance Delta satisfy
`D_alpha <= kappa alpha Delta^2 / (2 sigma^2)`. Proof: the family is exponential with natural parameter
theta = x / sigma^2 and log-partition function A, so that

    (alpha - 1) D_alpha(theta || theta') = A(alpha theta + (1 - alpha) theta') - alpha A(theta) + (alpha - 1) A(theta')

is alpha (alpha - 1) / 2 times the second derivative of A along the segment at some point, which is
`(Delta / sigma^2)^2 Var <= (Delta / sigma)^2 kappa`. Coordinates are independent, so the bound does not depend on their
number. For integer centres kappa may be taken as 1 (Canonne, Kamath, Steinke 2020, Proposition 5).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar

from geoquant.privacy.guarantee.gaussian import check_pair, least

__all__ = ["discrete_gaussian_rho", "kappa", "zcdp_delta", "zcdp_epsilon"]

WIDEST = 1.5  # from here on kappa - 1 is below the precision of a float
REACH = 40.0  # standard deviations summed over
ORDERS, GRID = (-12.0, 20.0), 256  # logarithms of alpha - 1 that are tried


def kappa(sigma: float) -> float:
    """sup over real centres of Var(k) / sigma^2; 1.144 at sigma 0.5, 1 + 3e-7 at 1, 1/(4 sigma^2) for small sigma.

    The supremum is at x = 1/2. With q = exp(-2 pi^2 sigma^2), Poisson summation and the series of log theta_3 give

        Var / sigma^2 = 1 + 8 pi^2 sigma^2 sum_n (-1)^n n q^n / (1 - q^(2n)) cos(2 pi n x),

    and at x = 1/2 every term is positive and as large as it can be. Evaluated as a sum over integers.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if sigma >= WIDEST:
        return 1.0 + 8 * math.pi**2 * sigma**2 * math.exp(-2 * math.pi**2 * sigma**2)
    away = np.arange(math.ceil(REACH * sigma) + 1) + 0.5  # both sides alike
    weights = np.exp((0.25 - away**2) / (2 * sigma**2))
    return float((weights * away**2).sum() / weights.sum() / sigma**2)


def discrete_gaussian_rho(sigma: float, sensitivity: float) -> float:
    """rho of the discrete Gaussian on the integers around real centres within L2 distance `sensitivity`."""
    return kappa(sigma) * (sensitivity / sigma) ** 2 / 2


def zcdp_delta(epsilon: float, rho: float) -> float:
    """A delta with which every rho-zCDP mechanism is (epsilon, delta)-DP, the least that one order alpha gives:

        min over alpha > 1 of exp((alpha - 1)(alpha rho - epsilon)) / (alpha - 1) (1 - 1/alpha)^alpha

    (Canonne, Kamath, Steinke 2020, Proposition 12). Every alpha is valid, so that stopping the search early is safe.
    """
    if not (epsilon >= 0 and rho >= 0):
        raise ValueError(f"epsilon and rho must be at least 0, got epsilon={epsilon}, rho={rho}")
    if rho == 0:
        return 0.0

    def log_delta(log_order):  # of alpha - 1
        above = np.exp(log_order)
        return above * ((1 + above) * rho - epsilon) - log_order - (1 + above) * np.log1p(1 / above)

    grid = np.linspace(*ORDERS, GRID)  # one minimum may hide behind another where epsilon is small
    best, apart = grid[np.argmin(log_delta(grid))], grid[1] - grid[0]
    found = minimize_scalar(log_delta, bounds=(best - apart, best + apart), method="bounded", options={"xatol": 1e-9})
    return math.exp(min(0.0, float(found.fun)))


def zcdp_epsilon(delta: float, rho: float) -> float:
    """The smallest epsilon that `zcdp_delta` gives for this delta, rounded up."""
    check_pair(0.0, delta)
    return least(lambda epsilon: zcdp_delta(epsilon, rho) <= delta)

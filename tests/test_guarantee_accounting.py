"""Accounting against high precision, brute-force divergences of small distributions, and dp-accounting."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from geoquant.errors import UserError
from geoquant.privacy.guarantee.concentrated import discrete_gaussian_rho, kappa, zcdp_delta, zcdp_epsilon
from geoquant.privacy.guarantee.gaussian import (
    composed,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_sigma,
)


def exact_delta(epsilon: float, mu: float) -> mpmath.mpf:
    """The same formula as it is written, in 120 digits."""
    with mpmath.workdps(120):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@settings(max_examples=150, deadline=None)
@given(st.floats(0, 60), st.floats(1e-2, 12))
def test_delta_is_right_to_many_digits_where_the_formula_as_written_cancels(epsilon, mu):
    truth = exact_delta(epsilon, mu)
    found = gaussian_delta(epsilon, mu)
    if truth > 1e-280:
        assert abs(found / truth - 1) < 1e-7
    else:
        assert found < 1e-279


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 30), st.floats(1e-12, 0.4))
def test_epsilon_mu_and_sigma_undo_delta_and_err_on_the_safe_side(epsilon, delta):
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(epsilon, mu) <= delta
    assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
    back = gaussian_epsilon(delta, mu)
    assert gaussian_delta(back, mu) <= delta
    assert back == pytest.approx(epsilon, abs=1e-7)
    assert gaussian_sigma(epsilon, delta, 3.0) == pytest.approx(3 / mu)


def test_noise_for_the_usual_budgets():
    # Sigma per unit of sensitivity at delta 1e-5, between two sigmas of which 120 digits say too little and enough.
    for epsilon in (8.0, 4.0, 2.0, 1.0):
        sigma = gaussian_sigma(epsilon, 1e-5, 1.0)
        assert exact_delta(epsilon, 1 / (sigma * (1 + 1e-9))) < 1e-5 < exact_delta(epsilon, 1 / (sigma * (1 - 1e-9)))
    assert [round(gaussian_sigma(e, 1e-5, 1.0), 3) for e in (8, 4, 2)] == [0.6, 1.081, 1.994]


def test_noise_that_is_not_gaussian_enough_costs_nothing_and_no_noise_costs_everything():
    assert gaussian_delta(1.0, 0.0) == 0.0
    assert gaussian_epsilon(1e-5, 0.0) == 0.0
    assert gaussian_delta(0.0, 1e3) == pytest.approx(1.0)
    for wrong in ((-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (math.inf, 0.1)):
        with pytest.raises(UserError, match="this is no"):
            gaussian_mu(*wrong)
    with pytest.raises(UserError, match="is a distance"):
        gaussian_sigma(1.0, 1e-5, 0.0)


def test_one_gaussian_over_several_tensors_is_one_gaussian():
    """The hockey-stick divergence of two products, summed over a grid, against the formula with the root of squares."""
    shifts, sigma, epsilon = (0.7, 1.1), 1.0, 0.9
    x = np.arange(-9, 9, 0.02)
    p = [np.exp(-(x**2) / 2 / sigma**2) for _ in shifts]
    q = [np.exp(-((x - shift) ** 2) / 2 / sigma**2) for shift in shifts]
    joint_p, joint_q = np.multiply.outer(*p), np.multiply.outer(*q)
    excess = np.maximum(joint_p / joint_p.sum() - math.exp(epsilon) * joint_q / joint_q.sum(), 0).sum()
    assert gaussian_delta(epsilon, composed(shifts) / sigma) == pytest.approx(excess, rel=1e-4)


def around(centre: float, sigma: float, reach: int = 60) -> np.ndarray:
    """The discrete Gaussian with this real centre, by summation."""
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-((k - centre) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def log_around(centre: float, sigma: float) -> np.ndarray:
    exponent = -((np.arange(-60, 61) - centre) ** 2) / (2 * sigma**2)
    return exponent - logsumexp(exponent)


def renyi(p: np.ndarray, q: np.ndarray, alpha: float) -> float:
    """In logarithms: far out both underflow."""
    return float(logsumexp(alpha * p + (1 - alpha) * q) / (alpha - 1))


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@pytest.mark.parametrize("sigma", [0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 3.0])
def test_kappa_is_the_largest_variance_over_real_centres(sigma):
    k = np.arange(-60, 61)
    variances = []
    for centre in np.linspace(0, 1, 201):
        p = around(centre, sigma)
        variances.append((p * k**2).sum() - (p * k).sum() ** 2)
    assert kappa(sigma) == pytest.approx(max(variances) / sigma**2, rel=1e-12)
    # The series of the logarithm of theta_3, at the centre where all of its terms are positive.
    q = mpmath.exp(-2 * mpmath.pi**2 * sigma**2)
    series = 1 + 8 * mpmath.pi**2 * sigma**2 * mpmath.nsum(lambda n: n * q**n / (1 - q ** (2 * n)), [1, mpmath.inf])
    assert kappa(sigma) == pytest.approx(float(series), rel=1e-12)


def test_kappa_where_it_is_known():
    assert [round(kappa(s), 4) for s in (0.25, 0.5, 0.7, 1.2)] == [4.0, 1.144, 1.0024, 1.0]
    assert kappa(0.05) == pytest.approx(1 / (4 * 0.05**2))


@settings(max_examples=150, deadline=None)
@given(st.floats(0.3, 2.0), st.floats(-0.5, 0.5), st.floats(0.01, 3.0), st.floats(1.05, 12.0))
def test_no_renyi_divergence_of_real_centres_exceeds_the_bound(sigma, centre, shift, alpha):
    p, q = log_around(centre, sigma), log_around(centre + shift, sigma)
    assert renyi(p, q, alpha) <= alpha * discrete_gaussian_rho(sigma, shift) * (1 + 1e-9) + 1e-9
    assert renyi(q, p, alpha) <= alpha * discrete_gaussian_rho(sigma, shift) * (1 + 1e-9) + 1e-9


def test_the_bound_is_tight_and_one_in_place_of_kappa_would_be_wrong():
    sigma, shift, alpha = 0.35, 0.02, 1.5
    found = renyi(log_around(0.5 - shift, sigma), log_around(0.5, sigma), alpha)
    assert found > 0.98 * alpha * discrete_gaussian_rho(sigma, shift)
    assert found > alpha * shift**2 / (2 * sigma**2) * 1.5


@pytest.mark.parametrize(("sigma", "shifts"), [(0.4, (0.3, 0.6)), (0.6, (1.0, 0.5)), (1.3, (0.7, 1.9))])
@pytest.mark.parametrize("epsilon", [0.5, 1.5, 4.0])
def test_delta_of_two_coordinates_by_brute_force_is_below_the_conversion(sigma, shifts, epsilon):
    p = np.multiply.outer(*(around(0.3, sigma, 25) for _ in shifts))
    q = np.multiply.outer(*(around(0.3 + shift, sigma, 25) for shift in shifts))
    truth = max(hockey_stick(p, q, epsilon), hockey_stick(q, p, epsilon))
    assert truth <= zcdp_delta(epsilon, discrete_gaussian_rho(sigma, composed(shifts)))


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 20), st.floats(1e-10, 0.1))
def test_the_conversion_is_the_least_over_orders_and_no_better_than_the_gaussian(rho, delta):
    epsilon = zcdp_epsilon(delta, rho)
    assert zcdp_delta(epsilon, rho) <= delta
    above = np.geomspace(1e-4, 1e7, 6_000)
    alpha = 1 + above
    grid = above * (alpha * rho - epsilon) - np.log(above) - alpha * np.log1p(1 / above)
    assert zcdp_delta(epsilon, rho) == pytest.approx(min(1.0, math.exp(grid.min())), rel=1e-4)
    # A Gaussian of this rho is one of the mechanisms that the bound speaks of.
    assert epsilon >= gaussian_epsilon(delta, math.sqrt(2 * rho)) - 1e-9


REFERENCE = {  # mu: (epsilon by PLD, by RDP) at delta 1e-5, printed by dp-accounting 0.6.0
    0.5: (1.9931, 2.1657),
    1.667: (8.0056, 8.6053),
}


@pytest.mark.parametrize("mu", REFERENCE)
def test_epsilon_is_that_of_dp_accounting_as_recorded(mu):
    by_pld, by_rdp = REFERENCE[mu]
    assert gaussian_epsilon(1e-5, mu) == pytest.approx(by_pld, abs=2e-4)
    assert zcdp_epsilon(1e-5, mu**2 / 2) == pytest.approx(by_rdp, abs=1e-2)


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-5), (1.0, 1e-7), (2.5, 1e-5)])
def test_epsilon_is_that_of_dp_accounting(mu, delta):
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    parts = [mu * math.sqrt(share) for share in (0.5, 0.3, 0.2)]  # three tensors
    event = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(1 / part) for part in parts])
    assert gaussian_epsilon(delta, composed(parts)) == pytest.approx(
        PLDAccountant(value_discretization_interval=1e-3).compose(event).get_epsilon(delta), abs=2e-3
    )
    orders = list(1 + np.geomspace(1e-2, 1e3, 400))
    assert zcdp_epsilon(delta, composed(parts) ** 2 / 2) == pytest.approx(
        RdpAccountant(orders).compose(event).get_epsilon(delta), rel=1e-3
    )

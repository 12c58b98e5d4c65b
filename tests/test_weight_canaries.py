"""The audit of a quantizer against mechanisms whose epsilon is known, and against rounding, which has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm

from geoquant.errors import UserError
from geoquant.lattice.klein import klein
from geoquant.privacy.weight_canaries import audit_quantizer

RUNS = 60
# More violations than this would fall to a bound that errs in exactly 5% of the runs once in a thousand.
ALLOWED = int(binom.ppf(0.999, RUNS, 0.05))
STEP = 0.02


def weights(seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism with sensitivity / sigma = mu (Balle and Wang 2018)."""

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 100)


def noisy(sigma: float, seed: int):
    generator = torch.Generator().manual_seed(1000 + seed)

    def quantize(weight):
        return ((weight + sigma * torch.randn(weight.shape, generator=generator)) / STEP).round() * STEP

    return quantize


@pytest.mark.parametrize("mu", [1.0, 3.0])
def test_noise_then_rounding_is_not_exceeded_and_a_fair_part_is_found(mu):
    """Rounding after noise is post-processing: (radius / sigma)-GDP, whatever the step."""
    sigma = 2 * STEP
    bounds = np.array(
        [audit_quantizer(noisy(sigma, run), weights(run), mu * sigma, seed=run).epsilon for run in range(RUNS)]
    )
    truth = gaussian_epsilon(mu, 1e-5)
    assert (bounds > truth).sum() <= ALLOWED
    assert np.median(bounds) > 0.2 * truth


def test_a_quantizer_that_ignores_its_weights_reveals_nothing():
    found = [audit_quantizer(lambda w: torch.zeros_like(w), weights(), 1.0, seed=s).epsilon for s in range(RUNS)]
    assert (np.array(found) > 0).sum() <= ALLOWED


def test_rounding_hides_a_canary_far_smaller_than_its_step():
    """Every weight moves by an eighth of a step and most codes stay; together they give the canary away."""
    radius = STEP / 8 * (64 * 128 / 64) ** 0.5
    bound = audit_quantizer(lambda w: (w / STEP).round() * STEP, weights(), radius, canaries=64)
    assert bound.correct > 0.8 * bound.guesses
    assert bound.epsilon > 0.5


def test_klein_rounding_has_no_guarantee_to_speak_of():
    """Its randomness is of the size of a step: what it hides of one weight, a canary on many shows again."""
    eye, order, ones = torch.eye(128), torch.arange(128), torch.ones(128)
    generator = torch.Generator().manual_seed(3)

    def quantize(weight):
        steps = torch.full((64,), STEP)
        return klein(weight, eye, order, steps, ones, 0.5, generator).float() * STEP

    wide = audit_quantizer(quantize, weights(), 3 * STEP)
    assert wide.epsilon > 1
    assert "adjacency: weights that differ by one canary" in wide.covers
    assert "norm 0.06" in wide.covers


def test_refusals():
    with pytest.raises(UserError, match="needs weights of its own"):
        audit_quantizer(lambda w: w, torch.zeros(3, 3), 1.0, canaries=10)
    with pytest.raises(UserError, match="radius"):
        audit_quantizer(lambda w: w, torch.zeros(30, 30), 0.0, canaries=10)

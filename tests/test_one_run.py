"""The one-run bound against mechanisms whose epsilon is known exactly, and its formula against exact odds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom, norm

from geoquant.errors import UserError
from geoquant.privacy.one_run import epsilon_lower_bound, fair_coins, one_run, p_value

RUNS = 200
M = 1000
# More violations than this would fall to a procedure that errs in exactly 5% of 200 runs once in a thousand.
ALLOWED = int(binom.ppf(0.999, RUNS, 0.05))


def randomised_response(rng, included, epsilon):
    """Every coin reported truthfully with probability e^eps / (e^eps + 1): epsilon-DP, exactly."""
    truthful = rng.random(len(included)) < expit(epsilon)
    return np.where(truthful, included, ~included).astype(np.float64)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism with sensitivity / sigma = mu (Balle and Wang 2018)."""

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 100)


def bounds(mechanism, candidates, runs=RUNS, m=M, **settings):
    """One-run bounds of `runs` independent runs of scores = mechanism(rng, coins)."""
    found = []
    for run in range(runs):
        rng = np.random.default_rng([7, run])
        included = rng.random(m) < 0.5
        found.append(one_run(mechanism(rng, included), included, candidates, seed=run, **settings).epsilon)
    return np.array(found)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_is_exceeded_no_more_often_than_stated(epsilon):
    found = bounds(lambda rng, coins: randomised_response(rng, coins, epsilon), [(M // 2, M // 2)])
    assert (found > epsilon).sum() <= ALLOWED
    if epsilon:
        assert np.median(found) > 0.7 * epsilon  # not vacuous


@pytest.mark.parametrize(("mu", "guesses", "share"), [(0.5, 50, 0.15), (1.0, 50, 0.25), (3.0, 250, 0.25)])
def test_the_gaussian_mechanism_is_not_exceeded_and_a_fair_part_is_found(mu, guesses, share):
    delta = 1e-5
    truth = gaussian_epsilon(mu, delta)
    found = bounds(lambda rng, coins: mu * coins + rng.normal(size=M), [(guesses, guesses)], delta=delta)
    assert (found > truth).sum() <= ALLOWED
    assert np.median(found) > share * truth


def test_several_numbers_of_guesses_are_paid_for():
    # No leak at all: every positive bound is an error, and picking the best of four must not make more of them.
    candidates = [(10, 10), (50, 50), (200, 200), (500, 500)]
    none = lambda rng, coins: rng.normal(size=M)  # noqa: E731
    assert (bounds(none, candidates) > 0).sum() <= ALLOWED
    # Unpaid for, the errors of four nearly independent looks would add up.
    unpaid = np.max([bounds(none, [pair]) for pair in candidates], axis=0)
    assert (unpaid > 0).sum() > ALLOWED
    rng = np.random.default_rng(0)
    included = fair_coins(M, 0)
    best = one_run(included + 0.7 * rng.normal(size=M), included, candidates)
    assert best.candidates == 4
    assert (best.m, best.delta, best.confidence) == (M, 0.0, 0.95)
    assert best.guesses in [2 * k for k, _ in candidates]


def test_a_mechanism_without_noise_gives_a_large_bound():
    included = fair_coins(M, 1)
    bound = one_run(included.astype(float), included, [(300, 300)], delta=1e-5)
    assert bound.correct == bound.guesses == 600
    assert bound.epsilon > 4.5
    assert "one canary in or out" in bound.covers
    assert "lower bound" in bound.covers


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.5, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 3e-4])
def test_no_exactly_known_mechanism_beats_the_p_value(epsilon, delta):
    m, p = 80, expit(epsilon)
    counts = np.arange(m + 1)
    response = binom.sf(counts - 1, m, p)
    # (0, delta) part first: all given away with probability delta, or every canary by itself with delta.
    everything = delta + (1 - delta) * response
    one_by_one = binom.sf(counts - 1, m, delta + (1 - delta) * p)
    for count in counts:
        allowed = p_value(m, m, int(count), epsilon, delta)
        assert allowed >= max(everything[count], one_by_one[count]) - 1e-12
    if delta == 0:
        np.testing.assert_allclose([p_value(m, m, int(v), epsilon) for v in counts], response, atol=1e-12)


def test_the_delta_term_is_the_worst_way_to_spend_it():
    # Linear programme over how many canaries are given away (F in 0..v, mean at most 2 m delta), W binomial.
    from scipy.optimize import linprog

    m, r, v, epsilon, delta = 200, 60, 45, 0.7, 2e-4
    gains = binom.sf(v - np.arange(v + 1) - 1, r, expit(epsilon))
    answer = linprog(
        -gains,
        A_ub=[np.arange(v + 1)],
        b_ub=[2 * m * delta],
        A_eq=[np.ones(v + 1)],
        b_eq=[1],
        bounds=(0, 1),
    )
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(-answer.fun, rel=1e-8)


def test_the_bound_is_where_the_p_value_crosses():
    for guesses, correct, delta in [(100, 80, 0.0), (100, 80, 1e-5), (40, 40, 0.0), (500, 300, 1e-6)]:
        bound = epsilon_lower_bound(1000, guesses, correct, delta=delta)
        assert p_value(1000, guesses, correct, bound, delta) == pytest.approx(0.05, abs=1e-9)
    # All right, delta = 0: p^r = 0.05 by hand.
    p = 0.05 ** (1 / 40)
    assert epsilon_lower_bound(1000, 40, 40) == pytest.approx(np.log(p / (1 - p)))
    assert epsilon_lower_bound(1000, 100, 50) == 0.0
    assert epsilon_lower_bound(1000, 10, 0, delta=1e-5) == 0.0
    # More right guesses, less delta, less confidence: a larger bound.
    assert epsilon_lower_bound(1000, 100, 85) > epsilon_lower_bound(1000, 100, 80)
    assert epsilon_lower_bound(1000, 100, 80) > epsilon_lower_bound(1000, 100, 80, delta=1e-4)
    assert epsilon_lower_bound(1000, 100, 80, confidence=0.9) > epsilon_lower_bound(1000, 100, 80)


def test_tied_scores_and_the_order_of_the_list_give_nothing_away():
    # Canaries that are in listed first: a stable sort of equal scores would guess them all.
    included = np.arange(M) < 500
    found = [one_run(np.zeros(M), included, [(100, 100)], seed=seed).epsilon for seed in range(RUNS)]
    assert (np.array(found) > 0).sum() <= ALLOWED
    infinite = np.where(included, 0.0, -np.inf)
    assert one_run(infinite, included, [(100, 100)]).correct == 200


def test_only_the_high_side_may_be_guessed():
    included = fair_coins(M, 3)
    # In-canaries raise some scores; low scores say nothing.
    scores = np.where(included & (np.arange(M) % 4 == 0), 5.0, 0.0) + np.random.default_rng(0).normal(size=M)
    high = one_run(scores, included, [(80, 0)])
    both = one_run(scores, included, [(80, 80)])
    assert (high.guesses, both.guesses) == (80, 160)
    assert high.epsilon > both.epsilon


def test_mistakes_are_named():
    included = fair_coins(100, 0)
    scores = np.zeros(100)
    with pytest.raises(UserError, match="not included by fair coins"):
        one_run(scores, np.ones(100, bool), [(5, 5)])
    with pytest.raises(UserError, match="more guesses than canaries"):
        one_run(scores, included, [(60, 60)])
    with pytest.raises(UserError, match="number of guesses"):
        one_run(scores, included, [])
    with pytest.raises(UserError, match="one coin for each canary"):
        one_run(scores, included[:50], [(5, 5)])
    with pytest.raises(UserError, match="not a number"):
        one_run(scores * np.nan, included, [(5, 5)])
    with pytest.raises(UserError, match="delta < 1"):
        one_run(scores, included, [(5, 5)], delta=0.01)
    with pytest.raises(UserError, match="0 <= right <= guesses"):
        p_value(10, 5, 6, 1.0)
    with pytest.raises(UserError, match="between 0 and 1"):
        epsilon_lower_bound(10, 5, 5, confidence=1.0)

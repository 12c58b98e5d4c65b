"""Bandits on instances whose best arm and gaps are known."""

from __future__ import annotations

import numpy as np
import pytest

from geoquant.plan.bandit import POLICIES, regret_bound

MEANS = np.array([0.3, 0.45, 0.8, 0.6, 0.5])
RUNS, TRIES = 20, 400


def played(policy, seed: int, means=MEANS, tries: int = TRIES, scale: float = 1.0) -> np.ndarray:
    """How often each arm was tried; rewards are scale times coins."""
    rng, coins = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
    rewards = [[] for _ in means]
    for _ in range(tries):
        arm = policy(rewards, rng, scale)
        rewards[arm].append(scale * float(coins.random() < means[arm]))
    return np.array([len(one) for one in rewards])


@pytest.mark.parametrize("name", POLICIES)
def test_regret_stays_below_the_bound_and_far_below_chance(name):
    """The mean over 20 runs. UCB1's bound holds for the expectation (321 here); random choice has 0.27 a try (108),
    with a standard error over runs below 3. That either policy misses half of it by chance: less than one in 10^6.
    """
    gaps = MEANS.max() - MEANS
    regrets = [float(gaps @ played(POLICIES[name], seed)) for seed in range(RUNS)]
    mean, error = np.mean(regrets), np.std(regrets) / RUNS**0.5
    assert mean + 5 * error < regret_bound(gaps, TRIES)
    assert mean + 5 * error < 0.75 * TRIES * gaps.mean()


@pytest.mark.parametrize("name", POLICIES)
def test_the_best_arm_is_tried_most(name):
    """In each of 10 runs of 1,000 tries."""
    for seed in range(10):
        assert played(POLICIES[name], seed, tries=1000).argmax() == MEANS.argmax()


@pytest.mark.parametrize("name", POLICIES)
def test_units_of_the_reward_do_not_matter(name):
    counts = played(POLICIES[name], 3)
    np.testing.assert_array_equal(counts, played(POLICIES[name], 3, scale=1024.0))


def test_the_bound_is_that_of_the_paper():
    assert regret_bound([0.0, 0.5], 100) == pytest.approx(8 * np.log(100) / 0.5 + (1 + np.pi**2 / 3) * 0.5)
    assert regret_bound([0.0, 1.0], 100, scale=2.0) == pytest.approx(32 * np.log(100) + (1 + np.pi**2 / 3))


def test_ucb_tries_every_arm_first():
    assert list(played(POLICIES["ucb"], 0, tries=5)) == [1] * 5

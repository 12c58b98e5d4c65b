"""The audit of guarantees: mechanisms that keep their word are never contradicted, and each broken one is found out.

Error rates. An audit contradicts a claim that holds with probability at most 0.001 (its confidence is 0.999, over all
of its pairs). Broken mechanisms that give something away outright are missed with no measurable probability. The
weakest signal is noise that is too small by half: with 400,000 runs its bound is 4.5 where 3.55 is claimed, with a
standard deviation of 0.12 over audits, so that it is missed less often than once in a billion.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import binom

from geoquant.errors import UserError
from geoquant.privacy import two_point
from geoquant.privacy.guarantee import noise
from geoquant.privacy.guarantee.adjacency import OneRecord, WeightBall, euclidean, in_metric, in_steps
from geoquant.privacy.guarantee.gaussian import gaussian_epsilon
from geoquant.privacy.guarantee.noise import drawn, on_lattice, released
from geoquant.privacy.guarantee.pairs import weight_pairs
from geoquant.privacy.guarantee.provenance import Public, private
from geoquant.privacy.guarantee.shards import noisy_mean
from geoquant.privacy.guarantee.weight_ball import release
from geoquant.privacy.two_point import Pair, audit_pairs, lower_bound
from geoquant.privacy.weight_canaries import audit_quantizer

DELTA = 1e-5
RUNS, MANY = 100_000, 400_000
SIGMA = 1.2  # public grid steps; epsilon 3.55 for weights one step apart
STEP = 1.0


def claimed(distance: float) -> float:
    """What noise of SIGMA on everything gives for weights so far apart, in any direction."""
    return gaussian_epsilon(DELTA, distance / SIGMA)


def noised(x: np.ndarray, runs: int, sigma: float = SIGMA) -> np.ndarray:
    """The library's mechanism on `runs` copies of x: lattice, integer noise, and back."""
    copies = np.broadcast_to(x, (runs, len(x)))
    return released(on_lattice(copies, sigma) + drawn(copies.shape), sigma)


def rounded(x: np.ndarray) -> np.ndarray:
    """Any deterministic quantizer with public steps."""
    return np.rint(x / STEP) * STEP


X = np.array([0.1, 0.3, -0.6, 7.0])  # the last is an outlier
PAIRS = weight_pairs(X, STEP)
BESIDE = weight_pairs(X, STEP, further=1)  # of mechanisms that release a number beside the weights
X = PAIRS[0].one


def audit(run, pairs=PAIRS, runs=RUNS, **settings):
    return audit_pairs(run, pairs, claimed, delta=DELTA, runs=runs, **settings)


def caught(run, pairs=PAIRS, **settings) -> set[str]:
    return {found.name for found in audit(run, pairs, **settings) if found.caught}


# The bound itself, where the truth is known.


def test_the_bound_is_wrong_no_more_often_than_stated_and_close_where_it_can_be():
    """Randomised response is exactly epsilon-DP, and its two outputs are the best event there is."""
    epsilon, runs, confidence = 1.2, 4000, 0.9
    bounds = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        one, other = (rng.random(runs) < expit(sign * epsilon) for sign in (1, -1))
        bounds.append(lower_bound(one.astype(float), other.astype(float), delta=0.0, confidence=confidence)[0])
    # More than this would befall a procedure that errs in exactly a tenth of 300 audits once in a thousand.
    assert (np.array(bounds) > epsilon).sum() <= binom.ppf(0.999, 300, 1 - confidence)
    assert np.median(bounds) > 0.9 * epsilon


def test_choosing_and_judging_on_the_same_runs_would_err_more_often(monkeypatch):
    """Why the runs are split: with no leak at all, the best of 400 thresholds looks like one."""
    monkeypatch.setattr(two_point, "CAUTION", 1)
    errors = {"split": 0, "same": 0}
    for seed in range(100):
        one, other = np.random.default_rng(seed).normal(size=(2, 400))
        errors["split"] += lower_bound(one, other, delta=0.0, confidence=0.9)[0] > 0
        half = [np.concatenate([side[:200], side[:200]]) for side in (one, other)]  # judged by what chose
        errors["same"] += lower_bound(*half, delta=0.0, confidence=0.9)[0] > 0
    allowed = binom.ppf(0.999, 100, 0.1)
    assert errors["split"] <= allowed < errors["same"]


def test_events_on_either_side_and_of_either_neighbour_are_seen():
    n = 20_000
    rare = (np.arange(n) % 10 == 0) * 5.0  # with odds 0.1 on one side, impossible on the other
    never = np.zeros(n)
    for sign in (1, -1):
        for pair in ((rare, never), (never, rare)):
            shuffled = [np.random.default_rng(0).permutation(sign * side) for side in pair]
            epsilon, odds = lower_bound(*shuffled, delta=1e-5, confidence=0.95)
            assert epsilon > 4.5
            assert min(abs(odd - 0.1) for odd in odds) < 0.01 or min(abs(odd - 0.9) for odd in odds) < 0.01
    assert lower_bound(never, never, delta=1e-5, confidence=0.95)[0] == 0.0
    # All apart: no more than the runs can resolve.
    assert lower_bound(never, never + 1, delta=0.0, confidence=0.95)[0] == pytest.approx(
        math.log(n / 2 / 3.69), abs=0.01
    )


def test_delta_is_taken_off():
    n = 40_000
    rng = np.random.default_rng(0)
    given_away = np.where(rng.random(n) < 0.02, 9.0, rng.random(n))  # (0, 0.02)-DP against the other side
    assert lower_bound(given_away, rng.random(n), delta=0.02, confidence=0.999)[0] < 0.05
    assert lower_bound(given_away, rng.random(n), delta=0.0, confidence=0.999)[0] > 3.0


def test_what_is_no_audit_is_refused():
    good = np.zeros(10)
    with pytest.raises(UserError, match="scores are numbers"):
        lower_bound(np.full(10, np.nan), good, delta=0.0, confidence=0.9)
    with pytest.raises(UserError, match="between 0 and 1"):
        lower_bound(good, good, delta=0.0, confidence=1.0)
    with pytest.raises(UserError, match="needs a pair"):
        audit_pairs(noised, [], claimed, delta=DELTA)


# Mechanisms that keep their word.


def test_noise_then_rounding_is_never_contradicted_and_a_fair_part_is_found():
    found = audit(lambda x, n: rounded(noised(x, n)), runs=50_000)
    assert not [result.name for result in found if result.caught]
    assert found[0].claimed == pytest.approx(3.55, abs=0.01)
    assert 0.9 < found[0].epsilon < 3.55
    assert found[1].epsilon > 0.9  # the whole vector moves: distances add in squares


def test_a_release_in_public_steps_is_never_contradicted():
    """The public call itself: copies of the weights as rows, steps that differ by column, then rounding."""
    steps = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def run(x, n):
        rows = torch.tensor(x * steps.numpy()).expand(n, 4).double()
        norm = in_steps({"w": Public(steps.expand(n, 4), "steps of the base")})
        base = {"w": Public(torch.zeros(n, 4), "base")}
        out = release(private({"w": rows}, "m"), base, WeightBall(1.0, norm), epsilon=claimed(1.0), delta=DELTA)
        assert out.guarantee.mechanism.sigma == pytest.approx(SIGMA, rel=1e-5)
        return np.rint((out.tensors["w"].values / steps).numpy())

    assert not caught(run, runs=30_000)


def test_noise_in_a_metric_is_never_contradicted():
    """Distances in M = R^T R: pairs along its sharpest and flattest directions, scored by the whitened difference."""
    factor = torch.linalg.cholesky(torch.tensor([[4.0, 1.0], [1.0, 0.3]], dtype=torch.float64), upper=True)
    whiten = factor.numpy()

    def run(x, n):
        norm, base = in_metric({"w": Public(factor, "x")}), {"w": Public(torch.zeros(n, 2), "base")}
        rows = torch.tensor(x).expand(n, 2)
        out = release(private({"w": rows}, "m"), base, WeightBall(1.0, norm), epsilon=claimed(1.0), delta=DELTA)
        return out.tensors["w"].values.double().numpy()

    pairs = []
    for angle in (0.0, 0.8, 1.8):
        direction = np.array([math.cos(angle), math.sin(angle)])
        apart = direction / np.linalg.norm(whiten @ direction)
        score = lambda out, apart=apart: out @ (whiten.T @ whiten @ apart)  # noqa: E731
        pairs.append(Pair(f"angle {angle}", np.zeros(2), apart, 1.0, score))
    found = audit_pairs(run, pairs, claimed, delta=DELTA, runs=RUNS)
    assert not [result.name for result in found if result.caught]
    assert min(result.epsilon for result in found) > 1.2
    # The same noise, isotropic instead: flat directions of M are then overprotected, sharp ones given away.
    found = audit_pairs(lambda x, n: noised(x, n), pairs, claimed, delta=DELTA, runs=RUNS)
    assert any(result.epsilon < 0.5 for result in found) or any(result.caught for result in found)


def test_a_mean_of_shards_is_never_contradicted():
    found = audit_pairs(shards_with(2.0), RECORDS, claimed, delta=DELTA, runs=RUNS)
    assert not found[0].caught
    assert found[0].epsilon > 1.2


# Floating point.


def float_noise(x: np.ndarray, runs: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return (torch.tensor(x, dtype=torch.float32) + SIGMA * torch.randn(runs, 1, generator=generator)).double().numpy()


def on_the_grid(out: np.ndarray) -> np.ndarray:
    """Near zero a float has more digits than one plus noise can leave behind (Mironov 2012)."""
    fine = np.abs(out[:, 0]) < 2.0**-4
    return np.where(fine, (out[:, 0] * 2**24 % 1 != 0) * 1.0, 0.0)


def test_float_noise_gives_itself_away_and_lattice_noise_does_not():
    pair = [Pair("zero or one", np.zeros(1), np.ones(1), 1.0, on_the_grid)]
    assert caught(float_noise, pair) == {"zero or one"}

    def single(x, n):
        return noised(x, n).astype(np.float32).astype(np.float64)

    assert not caught(single, pair)
    # Nor do the last bits of the released integers: their remainders are fair on both sides.
    bits = [Pair(f"bit {b}", np.zeros(1), np.ones(1), 1.0, lambda out, b=b: _bit(out, b)) for b in (0, 3, 12)]
    assert not caught(noised, bits)


def _bit(out: np.ndarray, bit: int) -> np.ndarray:
    whole = np.floor(out[:, 0] * 2.0**32 / SIGMA).astype(np.int64)
    return ((whole >> bit) & 1).astype(float)


# Broken mechanisms. Each is what a hurried implementation would do.


def private_scales(x, n):
    """The step comes from the private weights, and travels with the codes."""
    step = np.abs(x).max() / 7
    return np.column_stack([np.rint(noised(x, n) / step) * step, np.full(n, step)])


def private_order(x, n):
    """Columns are sorted by private weights; a reader sees the order."""
    return np.column_stack([rounded(noised(x, n)), np.full(n, np.argsort(np.abs(x))[0])])


def unnoised_kept(x, n):
    """The outlier is kept at 16 bits, and nobody thought of it."""
    out = rounded(noised(x, n))
    out[:, 3] = np.float16(x[3])
    return out


def private_compensation(x, n, share=2.0):
    """Everything is noised, but kept column 1 absorbs the error of column 0 measured on its un-noised weight."""
    out = noised(x, n)
    out[:, 0] = rounded(out[:, 0])
    out[:, 1] += share * (x[0] - out[:, 0])
    return out


def rounded_first(x, n):
    """Integer noise on the rounded weight: an error of a hundredth of a step becomes a whole one."""
    return rounded(x) + np.rint(noised(np.zeros(len(x)), n))


def private_subset(x, n):
    """Noise only where the private weights are large."""
    return np.where(np.abs(x) >= 5.0, noised(x, n), x)


def reused_seed(x, n):
    """A generator started from the number in the run folder; whoever reads that takes the noise away."""
    noise_again = SIGMA * np.random.default_rng(7).normal(size=(n, len(x)))
    out = x + SIGMA * np.random.default_rng(7).normal(size=(n, len(x)))
    return out - noise_again


def stochastic_rounding(x, n):
    return np.floor(x + np.random.default_rng(1).random((n, len(x))))


def deterministic_rounding(x, n):
    return np.broadcast_to(rounded(x), (n, len(x)))


# out_1 + 2 out_0 is w_1 + 2 w_0 with fresh noise: w_0 was released twice.
COMPENSATED = Pair("both read", X, X + np.eye(4)[0], 1.0, lambda out: out[:, 0] + 2 * (out[:, 1] + 2 * out[:, 0]))

BROKEN = {
    private_scales: (BESIDE, {"outlier moved a little, seen beside", "outlier moved by a step, seen beside"}),
    private_order: (BESIDE, {"order turned around, seen beside"}),
    unnoised_kept: (PAIRS, {"outlier moved a little", "outlier moved by a step"}),
    private_compensation: ([COMPENSATED], {"both read"}),
    rounded_first: (PAIRS, {"across a boundary"}),
    private_subset: (PAIRS, {"a step apart", "across a boundary", "order turned around"}),
    reused_seed: (PAIRS, {"a step apart", "across a boundary", "outlier moved a little"}),
    stochastic_rounding: (PAIRS, {"a step apart", "outlier moved by a step"}),
    deterministic_rounding: (PAIRS, {"a step apart", "across a boundary"}),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda run: run.__name__)
def test_a_broken_mechanism_is_caught(broken):
    pairs, expected = BROKEN[broken]
    assert expected <= caught(broken, pairs, runs=MANY if broken is private_compensation else 20_000)


def test_halved_noise_is_caught():
    pair = [Pair("a step apart", np.zeros(1), np.ones(1), 1.0)]
    assert caught(lambda x, n: noised(x, n, SIGMA / 2), pair, runs=MANY)
    assert not caught(noised, pair, runs=MANY)


def test_pairs_a_step_apart_alone_would_miss_half_of_them():
    """Why audits need pairs that are near, on two sides of a boundary, and that move an outlier."""
    far = [pair for pair in BESIDE if pair.name.startswith("a step apart")]
    assert not caught(lambda x, n: np.column_stack([unnoised_kept(x, n), np.zeros(n)]), far)
    assert not caught(lambda x, n: np.column_stack([rounded_first(x, n), np.zeros(n)]), far)


def test_pairs_are_as_far_apart_as_they_say_and_refuse_too_few_weights():
    for pair in BESIDE:
        assert np.linalg.norm(pair.other - pair.one) == pytest.approx(pair.distance)
    by_name = {pair.name: pair for pair in PAIRS}
    across = by_name["across a boundary"]
    assert (np.rint(across.one) != np.rint(across.other)).sum() == 1
    turned = by_name["order turned around"]
    assert np.argmin(np.abs(turned.one)) != np.argmin(np.abs(turned.other))
    with pytest.raises(ValueError, match="needs four weights"):
        weight_pairs(X[:3], STEP)


def shards_with(factor: float):
    """Sample-and-aggregate of two shards whose changes have clip norm C, with noise for a sensitivity factor C / k."""
    k, clip = 2, 1.0
    sigma = SIGMA * factor * clip / k  # claimed(1.0) is then what is claimed for one record

    def run(x, n):
        return noisy_mean((np.broadcast_to(change, (n, 1)) for change in x), k, sigma)[0]

    assert OneRecord(k, clip).sensitivity == 2.0 * clip / k
    return run


# A record that turns its shard's clipped change around.
RECORDS = [Pair("a turned shard", np.array([[0.3], [1.0]]), np.array([[0.3], [-1.0]]), 1.0)]


def test_a_sensitivity_of_c_over_k_is_caught():
    assert audit_pairs(shards_with(1.0), RECORDS, claimed, delta=DELTA, runs=MANY)[0].caught


def test_a_biased_generator_is_caught(monkeypatch):
    """A table without its tail: noise that never leaves one sigma."""
    cut = [entry if index < 255 else 2**128 for index, entry in enumerate(noise._table()[0])]
    monkeypatch.setattr(noise, "_table", lambda: (cut, np.array([min(e >> 96, 2**32 - 1) for e in cut], np.uint32)))
    assert caught(noised, PAIRS[:1]) == {"a step apart"}


# One run on one artefact.


def quantizer(sigma: float):
    def quantize(weight):
        base = {"w": Public(torch.zeros_like(weight), "base")}
        ball = WeightBall(sigma, euclidean())  # radius sigma: mu is 1
        out = release(private({"w": weight}, "m"), base, ball, epsilon=gaussian_epsilon(DELTA, 1.0), delta=DELTA)
        return (out.tensors["w"].values / 0.02).round() * 0.02

    return quantize


def test_one_run_of_a_release_stays_below_its_claim_and_rounding_without_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(64, 128, generator=generator)
    sigma, runs = 0.04, 12
    truth = gaussian_epsilon(DELTA, 1.0)
    bounds = [audit_quantizer(quantizer(sigma), weight, sigma, seed=seed, delta=DELTA).epsilon for seed in range(runs)]
    assert (np.array(bounds) > truth).sum() <= binom.ppf(0.9999, runs, 0.05)
    bare = audit_quantizer(lambda w: (w / 0.02).round() * 0.02, weight, 2 * sigma, delta=DELTA).epsilon
    assert bare > max(bounds)
    assert bare > truth * 0.9

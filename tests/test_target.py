"""The asymmetric target against least squares on explicit tokens."""

from __future__ import annotations

import pytest
import torch

from geoquant.lattice.basis import NotPositiveDefinite
from geoquant.methods.babai import DAMPINGS
from geoquant.methods.target import output_target

COLUMNS, ROWS = 12, 7


def scene(tokens: int, seed: int, drift: float = 0.5, noise: float = 0.3):
    """Weights, and (full-precision inputs, runtime inputs, token weights) in double precision; a linear drift and some
    noise on top."""
    torch.manual_seed(seed)
    weight, mixing = torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS, COLUMNS).double() / COLUMNS**0.5

    def draw(count: int):
        exact = torch.randn(count, COLUMNS).double()
        runtime = exact + drift * exact @ mixing + noise * torch.randn(count, COLUMNS)
        return exact, runtime, torch.rand(count).double() + 0.1

    return weight, draw(tokens), draw(tokens // 3)


def sums(exact, runtime, weights):
    """The moments and the drift of explicit tokens."""
    metric = (runtime * weights[:, None]).T @ runtime
    drift = ((exact - runtime) * weights[:, None]).T @ runtime
    return metric.float(), drift.float()


def least_squares(weight, tokens, damping):
    """`argmin sum_t w_t ||W x_fp - Q x||^2 + damping * mean(diag A) ||Q - W||^2`, as one stacked system."""
    exact, runtime, weights = tokens
    roots, weight = weights.sqrt()[:, None], weight.double()
    level = damping * (runtime.square() * weights[:, None]).sum() / COLUMNS
    inputs = torch.cat([roots * runtime, level.sqrt() * torch.eye(COLUMNS)])
    outputs = torch.cat([roots * exact @ weight.T, level.sqrt() * weight.T])
    return torch.linalg.lstsq(inputs, outputs).solution.T


def output_error(quantized, weight, tokens):
    exact, runtime, weights = tokens
    return ((exact @ weight.double().T - runtime @ quantized.double().T).square().sum(1) * weights).sum().item()


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [9, 40, 200])
def test_the_target_is_the_least_squares_solution(tokens, damping):
    if tokens < COLUMNS and damping < 0.01:
        damping = 0.01  # fewer tokens than columns need some
    weight, seen, _ = scene(tokens, tokens)
    found = output_target(weight, *sums(*seen), damping=damping)
    assert found.strength == 1.0
    torch.testing.assert_close(found.weight.double(), least_squares(weight, seen, damping), rtol=1e-3, atol=1e-3)
    assert (found.weight - weight).norm() > 0.01 * weight.norm()


def test_distance_to_the_target_is_output_error():
    """`(W* - Q) A (W* - Q)^T` and the error of the outputs differ by what does not depend on Q."""
    weight, seen, _ = scene(100, 1)
    metric, drift = sums(*seen)
    target = output_target(weight, metric, drift, damping=1e-9).weight
    rest = []
    for seed in range(3):
        torch.manual_seed(seed)
        quantized = weight + 0.1 * torch.randn(ROWS, COLUMNS)
        difference = (target - quantized).double()
        rest.append(output_error(quantized, weight, seen) - ((difference @ metric.double()) * difference).sum().item())
    assert rest == pytest.approx([rest[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("held", [False, True])
def test_without_drift_the_weights_stay_to_the_bit(held):
    weight, (exact, _, weights), (other, _, few) = scene(60, 2)
    rest = sums(other, other, few) if held else ()
    assert torch.equal(output_target(weight, *sums(exact, exact, weights), *rest).weight, weight)


def test_much_damping_leaves_the_weights():
    weight, seen, held = scene(60, 3)
    shift = output_target(weight, *sums(*seen), *sums(*held), damping=1e6).weight - weight
    assert 0 < shift.norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize(("tokens", "noise"), [(6, 1.0), (15, 0.5), (30, 0.3), (300, 0.3)])
def test_strength_and_damping_have_the_least_held_out_error(tokens, noise):
    """Against trial solutions, measured on the held-out tokens themselves."""
    weight, seen, held = scene(tokens, 10 + tokens, noise=noise)
    found = output_target(weight, *sums(*seen), *sums(*held))
    errors = {}
    for damping in DAMPINGS:
        shift = least_squares(weight, seen, damping) - weight
        for step in range(101):
            errors[damping, step / 100] = output_error(weight + step / 100 * shift, weight, held)
    damping, strength = min(errors, key=errors.get)
    assert found.strength == pytest.approx(strength, abs=0.011)
    # Both sets of tokens serve in the end.
    together = tuple(torch.cat(parts) for parts in zip(seen, held))
    expected = weight + found.strength * (least_squares(weight, together, damping) - weight)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_few_noisy_tokens_are_believed_less_than_many():
    def strength(tokens: int) -> float:
        """Averaged over scenes."""
        total = 0.0
        for seed in range(10):
            weight, seen, held = scene(tokens, seed, noise=1.0)
            total += output_target(weight, *sums(*seen), *sums(*held), damping=0.003).strength
        return total / 10

    assert strength(15) < 0.8 * strength(60) < 0.8 * strength(1000)
    assert strength(1000) > 0.9


def test_a_drift_that_held_out_tokens_deny_is_not_followed():
    weight, seen, (exact, runtime, weights) = scene(60, 4, noise=0.05)
    opposite = sums(2 * runtime - exact, runtime, weights)
    found = output_target(weight, *sums(*seen), *opposite)
    assert found.strength == 0.0
    assert torch.equal(found.weight, weight)


def test_a_damaged_metric_is_refused():
    weight, seen, _ = scene(60, 5)
    metric, drift = sums(*seen)
    metric[2, 3] = metric[3, 2] = torch.nan
    with pytest.raises(NotPositiveDefinite, match="12 columns"):
        output_target(weight, metric, drift)

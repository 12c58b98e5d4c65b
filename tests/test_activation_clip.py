"""Clips against brute force on the raw values, the exact expression for a normal law, and a slow oracle; errors at the
outputs against the dense trace; the verdict on planted sites."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from conftest import tiny_llama
from geoquant.model.walk import read_weight, site_modules, walk
from geoquant.outliers.activation_clip import RULES, choose, divergences, mixed, per_token, quantize, squared_errors
from geoquant.outliers.activation_error import (
    adapt_tau,
    input_histograms,
    judge_mixed,
    output_error,
    output_errors,
)
from geoquant.outliers.histogram import collect
from test_tails import student
from test_tangent import generator


def laws() -> dict[str, torch.Tensor]:
    """A normal law, a long tail, even values, half zeros, and values that one is a thousand times larger than."""
    x = torch.randn(40_000, generator=generator())
    return {
        "normal": x,
        "student": student(3, 40_000),
        "even": torch.rand(40_000, generator=generator()) * 7,
        "half zeros": x.relu(),
        "massive": torch.cat([x, torch.tensor([-900.0])]),
    }


def raw_error(x: torch.Tensor, clip: float, bits: int) -> float:
    return (quantize(x.double(), clip, bits) - x.double()).square().mean().item()


# ---- the grid


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 8), st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), st.floats(1e-3, 1e4))
def test_a_grid_takes_the_nearest_of_its_values(bits, values, clip):
    levels = 2 ** (bits - 1) - 1
    x = torch.tensor(values, dtype=torch.float64)
    grid = torch.arange(-levels, levels + 1, dtype=torch.float64) * (clip / levels)
    found = quantize(x, clip, bits)
    away = (x[:, None] - grid).abs()
    assert torch.allclose((found - x).abs(), away.amin(1), rtol=1e-12, atol=1e-12 * clip)
    assert torch.allclose(quantize(found, clip, bits), found, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 8), st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=6, max_size=6))
def test_per_token_errors_are_at_most_half_a_step_of_the_token(bits, values):
    x = torch.tensor(values).view(2, 1, 3)
    found = per_token(x, bits)
    limit = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
    assert ((found - x).abs() <= limit * (1 + 1e-5) + 1e-37).all()
    alone = per_token(x[:1], bits)
    assert torch.equal(alone, found[:1])  # another token changes nothing


def test_zeros_stay_zeros_and_bits_have_limits():
    assert torch.equal(per_token(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(quantize(torch.ones(3), 0.0), torch.zeros(3))
    assert all(choose(collect(torch.zeros(5)), rule) == 0 for rule in RULES)
    with pytest.raises(ValueError, match="got 9"):
        quantize(torch.ones(3), 1.0, 9)
    with pytest.raises(
        ValueError, match=r"'median'; there are max, percentile, squared, divergence, divergence, even bins"
    ):
        choose(collect(torch.ones(5)), "median")


# ---- squared error


@pytest.mark.parametrize("law", laws())
def test_the_histogram_knows_the_error_of_the_values(law):
    x = laws()[law]
    found = collect(x)
    top = x.abs().max().item()
    for bits in (4, 8):
        for clip in (top, top * 0.6, top * 0.23):
            beyond, within = (part.item() for part in squared_errors(found, torch.tensor([clip]), bits))
            true = raw_error(x, clip, bits)
            bound = ((2 ** (bits - 1) - 1) / 512) ** 2 / 3
            assert true * (1 - 1e-9) <= beyond + within <= true * (1 + 1.2 * bound + 1e-5)
            over = x.double().abs() > clip
            clipped = (x.double().abs() - clip)[over].square().sum().item() / len(x)
            assert beyond == pytest.approx(clipped, rel=0.01, abs=1e-6 * true)


@pytest.mark.parametrize("law", laws())
def test_no_clip_of_the_values_themselves_is_better(law):
    """Brute force: 3000 clips on the raw values. The histogram's is at most 0.5% worse than their best."""
    x = laws()[law][:5000] if law != "massive" else laws()[law][-5000:]
    top = x.abs().max().item()
    for bits in (4, 8):
        best = min(raw_error(x, clip, bits) for clip in np.geomspace(top / 500, top, 3000))
        assert raw_error(x, choose(collect(x), "squared", bits), bits) <= 1.005 * best


def normal_error(clip: float, bits: int) -> float:
    """The mean squared error of the grid on a standard normal law, exactly: every cell by antiderivatives."""
    levels = 2 ** (bits - 1) - 1
    values = np.arange(-levels, levels + 1) * clip / levels
    borders = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    density = norm.pdf(borders)
    first = -density
    second = norm.cdf(borders) - np.where(np.isinf(borders), 0, borders) * density
    mass, first, second = (np.diff(part) for part in (norm.cdf(borders), first, second))
    return float((second - 2 * values * first + values**2 * mass).sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_optimum_of_a_normal_law(bits):
    optimum = scipy.optimize.minimize_scalar(normal_error, bounds=(1.5, 6), args=(bits,), method="bounded")
    x = torch.randn(1_000_000, generator=generator())
    clip = choose(collect(x), "squared", bits)
    assert clip == pytest.approx(optimum.x, rel=0.03)
    assert normal_error(clip, bits) == pytest.approx(optimum.fun, rel=2e-3)
    assert sum(squared_errors(collect(x), torch.tensor([clip]), bits)).item() == pytest.approx(optimum.fun, rel=0.01)


@settings(max_examples=10, deadline=None)
@given(st.integers(-12, 12), st.sampled_from(sorted(RULES)), st.integers(4, 8))
def test_clips_have_the_units_of_the_values(power, rule, bits):
    x = student(3, 3000)
    assert choose(collect(x * 2.0**power), rule, bits) == pytest.approx(choose(collect(x), rule, bits) * 2.0**power)
    assert choose(collect(-x), rule, bits) == pytest.approx(choose(collect(x), rule, bits))


def test_the_other_rules_mean_what_they_are_called():
    x = laws()["student"]
    found = collect(x)
    assert choose(found, "max") == x.abs().max().item()
    assert (x.abs() > choose(found, "percentile")).float().mean().item() == pytest.approx(1e-4, abs=3e-5)
    assert mixed(3.0, 4.0) == "squared"
    assert mixed(4.0, 4.0) == "divergence"
    assert mixed(1e9, math.inf) == "squared"
    assert mixed(4.0, 4.0, heavy="max") == "max"


# ---- divergence


def slow_divergence(x: torch.Tensor, clip: float, bits: int, smoothing: float, even: int | None) -> float:
    """The definition, value by value and bin by bin, on bins of its own making."""
    levels = 2 ** (bits - 1) - 1
    bins: dict[tuple[int, int], list[float]] = {}
    for value in x.abs().tolist():
        fraction, exponent = math.frexp(value)  # value = fraction * 2^exponent, 1/2 <= fraction < 1
        bins.setdefault((exponent, math.floor((fraction - 0.5) * 1024)), []).append(value)
    ordered = sorted(bins.items())
    width = {key: 2.0 ** key[0] / 1024 for key, _ in ordered}
    mean = {key: sum(values) / len(values) for key, values in ordered}
    if even:
        step, joined = max(x.abs().tolist()) / even, {}
        for key, values in ordered:
            joined.setdefault(min(even - 1, math.floor(mean[key] / step)), []).extend(values)
        ordered, bins = sorted(joined.items()), joined
        width = dict.fromkeys(joined, step)
        mean = {key: sum(values) / len(values) for key, values in ordered}
    inside = [key for key, _ in ordered if mean[key] <= clip]
    original = {key: len(bins[key]) for key in inside}
    original[inside[-1]] += sum(len(values) for key, values in ordered if mean[key] > clip)
    code = {key: min(levels, round(mean[key] * levels / clip)) for key in inside}
    spread = {}
    for key in inside:
        fellows = [other for other in inside if code[other] == code[key]]
        spread[key] = sum(len(bins[f]) for f in fellows) * width[key] / sum(width[f] for f in fellows)
    total, reach = sum(spread.values()), sum(width[key] for key in inside)
    found = 0.0
    for key in inside:
        p = original[key] / len(x)
        q = (1 - smoothing) * spread[key] / total + smoothing * width[key] / reach
        found += p * math.log(p / q)
    return found


def test_divergence_is_the_slow_oracles():
    x = torch.cat([torch.randn(300, generator=generator()), torch.tensor([-70.0])])
    assert x.abs().min() > 1e-4  # no zero: the oracle's bins begin at none
    found = collect(x)
    for bits in (4, 8):
        for smoothing, even in ((1e-4, None), (1e-2, None), (1e-4, 2048), (1e-3, 300)):
            clips = torch.tensor([0.7, 1.9, 3.3, 20.0, 70.0], dtype=torch.float64)
            expected = [slow_divergence(x, clip, bits, smoothing, even) for clip in clips.tolist()]
            assert divergences(found, clips, bits, smoothing, even).tolist() == pytest.approx(expected, rel=1e-9)


def test_divergence_clips_a_rare_tail_and_the_squared_error_does_not():
    """One value of 40,000, 900 times the others: it alone decides the squared error, and nothing of the divergence."""
    found = collect(laws()["massive"])
    assert choose(found, "squared") == pytest.approx(900, rel=2e-3)
    assert choose(found, "divergence") < 6
    assert choose(found, "divergence, even bins") >= 900 * 128 / 2048 - 1e-6  # by what it can see


def test_divergence_takes_the_best_clip_it_can_try():
    found = collect(laws()["student"])
    clip = choose(found, "divergence", 8)
    tried = torch.logspace(math.log10(0.5), math.log10(found.largest[0].item()), 300, dtype=torch.float64)
    least = divergences(found, tried, 8).min().item()
    assert divergences(found, torch.tensor([clip]), 8).item() <= least * 1.02
    clip = choose(found, "divergence, even bins", 8)
    least = divergences(found, tried[tried >= tried[-1] / 16], 8, even=2048).min().item()
    assert (
        divergences(found, torch.tensor([clip]), 8, even=2048).item() <= least * 1.05
    )  # codes of one and two bins: a rough curve


# ---- at the outputs


def test_output_error_is_the_trace():
    x = torch.randn(50, 7, generator=generator(), dtype=torch.float64)
    weight = torch.randn(5, 7, generator=generator(1), dtype=torch.float64)
    quantized = quantize(x, 2.0, 4)
    wrong, whole = output_error(weight, x, quantized).sum(1)
    moved = (quantized - x).T @ (quantized - x)
    assert wrong.item() == pytest.approx(torch.trace(weight @ moved @ weight.T).item())
    assert whole.item() == pytest.approx(torch.trace(weight @ (x.T @ x) @ weight.T).item())


def test_a_model_is_observed_and_judged_on_its_own_inputs():
    model = tiny_llama()
    tokens = torch.randint(3, 300, (6, 12), generator=generator())
    blocks = walk(model, tokens[:1])
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in site_modules(model).items()
    ]
    with torch.no_grad():
        model.model(tokens)
    for handle in handles:
        handle.remove()
    stages = [stage for block in blocks for stage in block.stages]
    for skip in (0, 1):
        found = input_histograms(model, blocks, tokens, skip)
        assert set(found) == {stage.name for stage in stages}
        for name, histogram in found.items():
            x = seen[name][0][:, skip:]
            assert histogram.count == x.numel()
            assert histogram.powers[1].item() == pytest.approx(x.double().square().sum().item(), rel=1e-5)
    arms = {
        "none": {stage.name: lambda x: x for stage in stages},
        "zero": {stage.name: torch.zeros_like for stage in stages},
        "token": {stages[3].name: lambda x: per_token(x, 4)},
    }
    errors = output_errors(model, blocks, tokens, arms)
    assert all(of["none"].energy == of["none"].token == 0 for of in errors.values())
    assert all(of["zero"].energy == pytest.approx(1) == of["zero"].token for of in errors.values())
    assert [name for name, of in errors.items() if "token" in of] == [stages[3].name]
    x = seen[stages[3].name][0].flatten(0, 1).double()
    weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stages[3].sites]).double()
    wrong = ((per_token(x, 4) - x) @ weight.T).square().sum(1)
    whole = (x @ weight.T).square().sum(1)
    judged = errors[stages[3].name]["token"]
    assert judged.energy == pytest.approx((wrong.sum() / whole.sum()).item(), rel=1e-4)
    assert judged.token == pytest.approx((wrong / whole).mean().item(), rel=1e-4)


def test_fused_sites_are_judged_together():
    model = tiny_llama()
    tokens = torch.randint(3, 300, (2, 8), generator=generator())
    stage = walk(model, tokens[:1])[0].stages[0]
    assert [site.name.rpartition(".")[2] for site in stage.sites] == ["q_proj", "k_proj", "v_proj"]
    seen = []
    handle = model.get_submodule(stage.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    error = output_errors(model, walk(model, tokens[:1]), tokens, {"a": {stage.name: lambda x: quantize(x, 1.0, 4)}})
    handle.remove()
    x = seen[-1].flatten(0, 1)
    parts = [
        output_error(read_weight(model.get_submodule(site.name)), x, quantize(x, 1.0, 4)).sum(1) for site in stage.sites
    ]
    wrong, whole = sum(parts)
    assert error[stage.name]["a"].energy == pytest.approx((wrong / whole).item(), rel=1e-5)


# ---- mixing


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=9),
)
def test_tau_is_the_best_of_all_thresholds(sites):
    kurtosis, squared, divergence = (torch.tensor(x, dtype=torch.float64) for x in zip(*sites))

    def cost(tau: float) -> float:
        return torch.where(kurtosis >= tau, divergence.log(), squared.log()).sum().item()

    found = cost(adapt_tau(kurtosis, squared, divergence))
    assert found == pytest.approx(min(map(cost, [-math.inf, math.inf, *(kurtosis + 0.5).tolist()])), abs=1e-9)


def test_a_tail_that_tells_is_found_and_one_that_does_not_is_not():
    kurtosis = torch.linspace(0, 40, 41)
    heavy = kurtosis >= 20
    squared = torch.where(heavy, 3.0, 1.0)
    divergence = torch.where(heavy, 1.0, 4.0)
    tau = adapt_tau(kurtosis, squared, divergence)
    assert 19 < tau <= 20
    found = judge_mixed(kurtosis, squared, divergence, tau)
    assert found.single == "squared"
    assert found.gain == found.best == pytest.approx(-math.log(3) * 21 / 41)
    assert found.share == pytest.approx(21 / 41)
    assert found.p == 0.001
    wrong = judge_mixed(kurtosis.flip(0), squared, divergence, tau)
    assert wrong.gain > 0
    assert wrong.p > 0.99
    alike = judge_mixed(kurtosis, squared, divergence, math.inf)
    assert (alike.gain, alike.se, alike.share, alike.p) == (0, 0, 0, 1)


def test_chance_passes_at_the_stated_rate():
    """100 models whose tails tell nothing: p <= 0.1 in 10 of them, in more than 22 with probability below 1e-4."""
    low = 0
    for seed in range(100):
        random = torch.rand(3, 30, generator=generator(seed))
        low += judge_mixed(random[0], random[1] + 0.1, random[2] + 0.1, 0.5, permutations=49, seed=seed).p <= 0.1
    assert low <= 22


def test_dead_sites_do_not_count():
    kurtosis = torch.tensor([1.0, 2.0, math.nan, 3.0, 4.0])
    squared = torch.tensor([1.0, 1.0, math.nan, 5.0, 0.0])
    divergence = torch.tensor([2.0, 2.0, math.nan, 1.0, 0.0])
    assert adapt_tau(kurtosis, squared, divergence) == 2.5
    assert judge_mixed(kurtosis, squared, divergence, 2.5).share == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="none of 2 sites"):
        adapt_tau(kurtosis[:2], torch.zeros(2), torch.zeros(2))


def test_first_tokens_that_cannot_be_told_are_refused():
    model = tiny_llama()
    tokens = torch.randint(3, 300, (2, 8), generator=generator())
    blocks = walk(model, tokens[:1])
    mlp, plain = model.model.layers[1].mlp, model.model.layers[1].mlp.forward
    mlp.forward = lambda x: plain(x.flatten(0, 1)).view_as(x)  # as experts see their tokens
    assert input_histograms(model, blocks, tokens)[blocks[1].stages[2].name].count == 16 * 32
    with pytest.raises(ValueError, match=r"first tokens of .*layers.1.mlp.* are not known: its input is \(16, 32\)"):
        input_histograms(model, blocks, tokens, skip=1)
    assert not any(module._forward_pre_hooks for module in model.modules())

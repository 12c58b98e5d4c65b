"""What gains do to channels: gains read from the outside, ratios by hand, shuffled gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from geoquant.outliers.norms import GainSums, NormGains, find_norms, norm_gain
from oracles.models import build


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def summed(norm, x):
    bias = getattr(norm, "bias", None)
    sums = GainSums(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
    with torch.no_grad():
        for part in x.split(2):
            output = norm(part)
            sums.add(part, output if bias is None else output - bias)
    return sums.fit()


@pytest.mark.parametrize(
    ("name", "place", "gain"),
    [
        ("llama", "model.layers.0.input_layernorm", lambda norm: norm.weight),
        ("gemma3", "model.layers.1.post_feedforward_layernorm", lambda norm: 1 + norm.weight),
        ("gpt2", "transformer.h.2.ln_1", lambda norm: norm.weight),
    ],
)
def test_gain_and_amplitudes_are_read_from_what_passes(name, place, gain):
    """Gains that multiply, gains that are added to one, and a mean and a bias besides."""
    norm = build(name).get_submodule(place)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    x = torch.randn(6, 10, 24, generator=generator()) * torch.linspace(0.1, 3, 24) + 0.2
    found, amplitude = summed(norm, x)
    torch.testing.assert_close(found, gain(norm).detach(), rtol=1e-4, atol=1e-5)
    flat = x.flatten(0, 1).double()
    if name == "gpt2":
        flat = flat - flat.mean(1, keepdim=True)
    flat = flat / flat.square().mean(1, keepdim=True).sqrt()
    expected = flat.square().sum(0).sqrt()
    torch.testing.assert_close(amplitude.double(), expected, rtol=1e-3, atol=0)


def test_what_a_norm_adds_to_the_variance_counts_where_tokens_are_small():
    norm = build("llama").model.layers[0].input_layernorm
    x = torch.randn(6, 10, 24, generator=generator()) * torch.logspace(-5, 0, 10)[:, None]
    found, amplitude = summed(norm, x)
    torch.testing.assert_close(found, norm.weight.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = (norm(x) / norm.weight).square().sum((0, 1)).sqrt()
    torch.testing.assert_close(amplitude, expected, rtol=1e-4, atol=0)


def test_what_mixes_channels_is_no_gain():
    class MixingNorm(nn.Module):
        def forward(self, x):
            return x.roll(1, dims=-1).tanh()

    norm = MixingNorm()
    assert list(find_norms(nn.Sequential(norm, nn.Linear(3, 3)))) == ["0"]
    assert summed(norm, torch.randn(4, 10, 8, generator=generator())) is None
    assert GainSums().fit() is None


def test_amplification_is_that_of_max_over_median():
    gain, amplitude = torch.tensor([1.0, -3.0, 0.5, 1.0, 2.0]), torch.tensor([1.0, 4.0, 2.0, 0.5, 1.5])
    found = norm_gain("n", 0, gain, amplitude, generator())
    before = 4.0 / 1.5
    after = np.abs(gain.numpy()) * amplitude.numpy()
    assert found.amplification == pytest.approx(after.max() / np.median(after) / before)
    # Ranks of |gain| 2.5 5 1 2.5 4 against those of the amplitude 2 5 4 1 3: Pearson's correlation of both.
    assert found.spearman == pytest.approx(np.corrcoef([2.5, 5, 1, 2.5, 4], [2, 5, 4, 1, 3])[0, 1])
    assert found.error == 0.5


def test_a_gain_aimed_at_the_largest_channel_is_no_chance():
    amplitude = torch.rand(200, generator=generator(1)) + 0.5
    amplitude[17] = 5.0
    gain = torch.rand(200, generator=generator(2)) + 0.5
    gain[17] = 20.0
    aimed = norm_gain("aimed", 3, gain, amplitude, generator())
    assert aimed.amplification > 10
    assert aimed.p <= 0.02  # one order in 200 aims as well
    assert aimed.shuffled < aimed.amplification / 2
    damping = norm_gain("damping", 0, 1 / amplitude, amplitude, generator())
    assert damping.amplification == pytest.approx(np.median(amplitude.numpy()) / 5, rel=0.01)
    assert damping.spearman == pytest.approx(-1, abs=1e-6)
    text = NormGains((aimed, damping)).finding()
    assert "1 of 2 norms" in text
    assert "most in aimed" in text


def test_gains_that_know_nothing_of_the_channels_pass_at_the_stated_rate():
    """p <= 0.05 in one of twenty: of 60 draws, more than nine with probability below 1e-3 (binomial)."""
    low, ranks = 0, []
    for seed in range(60):
        gain, amplitude = torch.rand(2, 64, generator=generator(seed)) + 0.1
        found = norm_gain("n", 0, gain, amplitude, generator(100 + seed))
        low += found.p <= 0.05
        ranks.append(found.spearman / found.error)
    assert low <= 9
    # Sixty correlations in units of their error: mean square 1 within four standard errors of a chi-square's.
    assert abs(np.square(ranks).mean() - 1) < 4 * (2 / 60) ** 0.5


def test_even_gains_have_no_ranks():
    found = norm_gain("n", 0, torch.ones(8), torch.arange(1.0, 9.0), generator())
    assert found.amplification == 1
    assert found.spearman is None
    assert "no norm was found" in NormGains(()).finding()
    assert "rank correlation" not in NormGains((found,)).finding()

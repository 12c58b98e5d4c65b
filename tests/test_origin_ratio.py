"""How much lies far out: against counting, and against the laws of normal, Laplace and Cauchy numbers."""

from __future__ import annotations

import math

import pytest
import torch

from geoquant.outliers.outlier_ratio import (
    OutlierRatio,
    OutlierRatios,
    normal_tail,
    outlier_ratio,
    tails,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def within(found, expected, count):
    """Within four standard errors of a binomial share (6e-5 to be beyond), or one count of rounding."""
    return abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / count) + 1 / count


@pytest.mark.parametrize("deviations", [2.0, 3.0, 4.0, 6.0])
def test_normal_numbers_lie_far_out_as_often_as_their_law_says(deviations):
    x = 3 * torch.randn(1000, 500, generator=generator()) + 1.0
    found = tails(x, deviations)
    assert found.count == 500_000
    assert within(found.six_sigma, normal_tail(deviations), found.count)


def test_longer_tails_by_their_laws():
    """Laplace beyond six of its deviations: exp(-6 sqrt 2); Cauchy beyond 20 medians of its size: 2/pi atan(1/20)."""
    uniform = torch.rand(1000, 500, generator=generator(1), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    laplace = torch.where(uniform < 0.5, (2 * uniform).log(), -(2 - 2 * uniform).log()).float()
    assert within(tails(laplace).six_sigma, math.exp(-6 * math.sqrt(2)), uniform.numel())
    cauchy = (math.pi * (uniform - 0.5)).tan().float()
    share = 2 / math.pi * math.atan(1 / 20)
    # The median is found too, at an error that moves the share by less than the count does.
    assert abs(tails(cauchy).medians - share) < 6 * math.sqrt(share / uniform.numel())


def test_tails_against_counting():
    x = torch.randn(40, 30, generator=generator(2))
    x[3, 4], x[7, 8] = 900.0, -30.0
    found = tails(x)
    flat = x.flatten().double()
    z = (flat - flat.mean()).abs() / flat.std(correction=0)
    assert found.six_sigma == (z > 6).double().mean() == 1 / 1200
    median = x.abs().median()
    assert found.medians == (flat.abs() > 20 * median).double().mean() == 2 / 1200
    assert found.largest == pytest.approx(900 / median.item())


def test_a_massive_activation_widens_what_counts_as_far():
    """One number of 3e4 among 600,000 normal ones has half of a variance of 2501: only it is beyond six deviations."""
    x = torch.randn(2000, 300, generator=generator(3))
    x[0, 0] = 3e4
    deviation = math.sqrt((3e4**2 + x.numel()) / x.numel())
    assert tails(x).six_sigma == 1 / x.numel()
    found = tails(x, 2 / deviation)
    assert within(found.six_sigma, normal_tail(2), found.count)


def test_a_common_shift_moves_nothing():
    x = torch.randn(500, 200, generator=generator(10))
    assert tails(x + 4000.0, 3.0).six_sigma == pytest.approx(tails(x, 3.0).six_sigma, rel=0.02)


def test_the_ratio_counts():
    weights = [torch.randn(12, 9, generator=generator(4)).pow(3), torch.randn(5, 7, generator=generator(5)).pow(3)]
    norms = [torch.rand(9, generator=generator(6)), 3 * torch.rand(7, generator=generator(7))]
    scores = [(weight.abs() * norm).flatten().tolist() for weight, norm in zip(weights, norms)]
    for chosen in ([0], [1], [0, 1]):
        together = [score for index in chosen for score in scores[index]]
        limit = 5 * sum(together) / len(together)
        expected = sum(score > limit for score in together) / len(together)
        found, _ = outlier_ratio([weights[i] for i in chosen], [norms[i] for i in chosen])
        assert found == pytest.approx(expected)
    units, _ = outlier_ratio(weights, [1e4 * norm for norm in norms])
    assert units == outlier_ratio(weights, norms)[0]


def test_normal_weights_have_the_ratio_of_the_null_however_uneven_their_inputs():
    """Two matrices of different size; the inputs' norms spread over a factor of a thousand."""
    weights = [torch.randn(800, 256, generator=generator(8)), 3 * torch.randn(500, 128, generator=generator(9))]
    norms = [10 ** (3 * torch.rand(w.shape[1], generator=generator(i))) for i, w in enumerate(weights)]
    found, null = outlier_ratio(weights, norms)
    assert null > 0.01
    assert within(found, null, sum(weight.numel() for weight in weights))
    even, small = outlier_ratio([weights[0]], [torch.ones(256)])
    assert small == pytest.approx(normal_tail(5 * math.sqrt(2 / math.pi)), rel=0.02)
    assert within(even, small, weights[0].numel())
    tailed, null = outlier_ratio([weights[0].pow(3)], [torch.ones(256)])
    assert tailed > 100 * null


def test_findings_name_the_most():
    far, near = tails(torch.tensor([[0.1] * 99 + [50.0]])), tails(torch.ones(3, 3))
    sites = (OutlierRatio("a", 0, "mlp_in", 0.01, 0.01, near), OutlierRatio("b", 1, "mlp_in", 0.02, 0.01, far))
    blocks = (OutlierRatio(None, 0, "block", 0.01, 0.01, None), OutlierRatio(None, 1, "block", 0.03, 0.01, None))
    found = OutlierRatios(sites, blocks)
    assert "1.00% to 3.00%" in found.finding()
    assert "most in block 1" in found.finding()
    assert "500 times the median (b)" in found.finding()
    kept = found.to_dict()
    assert kept["normal_tails"]["six_sigma"] == pytest.approx(1.97e-9, rel=0.01)
    assert kept["sites"][1]["tails"]["six_sigma"] == 0.01
    assert kept["blocks"][0]["tails"] is None
    assert "no site" in OutlierRatios((), ()).finding()

"""How much of |W| ||x|| lies far out: against counting, and against normal weights."""

from __future__ import annotations

import json
import math

import pytest
import torch

from geoquant.outliers.context import SiteContext
from geoquant.outliers.outlier_ratio import OutlierRatio, OutlierRatios, outlier_ratio
from geoquant.outliers.score import site
from geoquant.outliers.scores import SCORES
from geoquant.outliers.statistics import summarise
from geoquant.outliers.tails import normal_tail, tails


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def within(found, expected, count):
    """Within four standard errors of a binomial share (6e-5 to be beyond), or one count of rounding."""
    return abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / count) + 1 / count


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


def test_the_score_of_that_name_is_the_ratio_of_a_site():
    x, weight = torch.randn(60, 20, generator=generator(11)), torch.randn(30, 20, generator=generator(12)).pow(3)
    public = summarise(x, torch.randn(60, 30, generator=generator(13)), 1.0)
    context = SiteContext("site", "mlp_in", weight, 0 * weight, public)
    share = site(SCORES["owl"], SCORES["owl"].compute(context)).item()
    assert share == pytest.approx(outlier_ratio([weight], [x.norm(dim=0)])[0])
    assert share > 0


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
    assert kept["normal_tails"]["beyond_sigma"] == pytest.approx(1.97e-9, rel=0.01)
    assert kept["sites"][1]["tails"]["beyond_sigma"] == 0.01
    assert kept["blocks"][0]["tails"] is None
    assert "no site" in OutlierRatios((), ()).finding()


def test_inputs_that_are_mostly_zero_have_no_peak_and_no_part_in_the_sentence():
    relu = tails(torch.tensor([[0.0] * 9 + [1.0]]))
    found = OutlierRatios(
        (OutlierRatio("a", 0, "mlp_in", 0.01, 0.01, relu), OutlierRatio("b", 0, "mlp_in", 0.01, 0.01, None)),
        (OutlierRatio(None, 0, "block", 0.01, 0.01, None),),
    )
    assert found.finding().endswith("times what these give).")
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_dict()["sites"][0]["tails"]["peak"] is None

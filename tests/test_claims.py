"""What options add up to, what noise leaves of bits, and the shape of a ball: before any private weight is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.privacy.guarantee.claim import DELTA, Ball, Inherit, Shards, claim_of
from geoquant.privacy.guarantee.metric import DAMPING, metric_factors, upper_factor
from geoquant.privacy.guarantee.price import USEFUL, Price, bits_left, price_of


def test_claims_by_their_options():
    assert claim_of() is None
    assert claim_of(base="b") is None
    assert claim_of(base="b", epsilon=8.0, radius=0.5) == Ball(8.0, DELTA, 0.5, "euclidean", "b")
    metric = claim_of(base="b", epsilon=2.0, delta=1e-7, radius=0.5, ball="metric")
    assert metric == Ball(2.0, 1e-7, 0.5, "metric", "b")
    assert claim_of(epsilon=1.0, shards=("x", "y"), clip=2.0) == Shards(1.0, DELTA, ("x", "y"), 2.0)
    assert claim_of(inherited="f") == Inherit("f")


PARTS = {
    "epsilon alone": ({"epsilon": 1.0}, "epsilon 1 says nothing without its adjacency.*train with DP-SGD"),
    "with a base": ({"epsilon": 1.0, "base": "b"}, "says nothing without its adjacency"),
    "with a delta": ({"epsilon": 1.0, "delta": 1e-6, "base": "b"}, "says nothing without its adjacency"),
    "radius alone": ({"radius": 1.0, "base": "b"}, "--radius is part of a guarantee; wanted --epsilon"),
    "shards alone": ({"shards": ("x",), "clip": 1.0}, "is part of a guarantee"),
    "delta alone": ({"delta": 1e-6}, "--delta is part of a guarantee"),
    "ball alone": ({"ball": "metric"}, "--ball is part of a guarantee"),
    "no base": ({"epsilon": 1.0, "radius": 1.0}, "which nobody named; wanted --base"),
    "no clip": ({"epsilon": 1.0, "shards": ("x",)}, "wanted --clip"),
    "two ways": ({"epsilon": 1.0, "radius": 1.0, "shards": ("x",)}, "one guarantee; got --radius and --shards"),
    "two others": ({"radius": 1.0, "inherited": "f"}, "one guarantee; got --radius and --inherited"),
    "epsilon beside the trainer's": ({"epsilon": 1.0, "inherited": "f"}, "its own epsilon and delta; got --epsilon"),
    "delta beside it": ({"delta": 1e-6, "inherited": "f"}, "its own epsilon and delta; got --delta"),
    "clip of a ball": ({"epsilon": 1.0, "radius": 1.0, "clip": 1.0, "base": "b"}, "--clip belongs to --shards"),
    "ball of shards": ({"epsilon": 1.0, "shards": ("x",), "clip": 1.0, "ball": "metric"}, "--ball belongs to --radius"),
    "base of shards": ({"epsilon": 1.0, "shards": ("x",), "clip": 1.0, "base": "b"}, "MODEL itself is the public base"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_claim_are_refused_in_one_line(case):
    values, words = PARTS[case]
    with pytest.raises(UserError, match=words) as refused:
        claim_of(**values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("steps", [0.0, 0.5, 1.2, 2.0])
def test_bits_left_are_those_of_a_coarser_grid_that_errs_as_much(steps):
    """By simulation: what noise and rounding do together, against rounding alone with wider steps."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1000, 1000, 400_000)
    error = float(np.square(np.rint(x + steps * rng.normal(size=len(x))) - x).mean())
    wider = 2 ** (4 - bits_left(4, steps))
    alone = float(np.square(np.rint(x / wider) * wider - x).mean())
    assert error == pytest.approx(alone, rel=0.01)


def test_the_step_of_a_price_is_that_of_as_many_bits_of_entropy():
    """Normal weights, rounded with the step that the price counts in, have the bits it names."""
    weight = 0.03 * torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    sigma = 0.01
    price = price_of({"w": weight, "norm": torch.ones(5)}, sigma, 4.0)
    step = sigma / price.steps
    edges = (np.arange(-200, 201) + 0.5) * step / float(weight.square().mean().sqrt())
    assert entropy(np.diff(norm.cdf(edges)), base=2) == pytest.approx(4.0, abs=0.01)
    assert price.left == pytest.approx(bits_left(4.0, price.steps))
    # Two matrices of unlike size: a mean over weights.
    both = price_of({"w": weight, "small": weight[:10] / 4}, sigma, 4.0).left
    small = price_of({"small": weight[:10] / 4}, sigma, 4.0).left
    assert both == pytest.approx((2000 * price.left + 10 * small) / 2010, abs=1e-6)


def test_a_price_recommends_dp_sgd_where_nothing_useful_remains():
    assert "DP-SGD" not in Price(0.1, 4.0, USEFUL).words
    assert "1.99 of 4 bits per weight remain; expect no useful model" in Price(0.1, 4.0, 1.99).words
    assert "DP-SGD" in Price(0.1, 4.0, 1.99).words
    assert "0.00 of 4 bits" in Price(0.1, 4.0, -3.0).words


def test_factors_are_roots_of_the_damped_second_moments_of_what_reaches_a_map():
    model = tiny_llama()
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    found = metric_factors(model, tokens, "a text")
    assert len(found) == 14
    assert "48 tokens of a text under the public base, damped by 1%" in next(iter(found.values())).source
    assert found["model.layers.0.self_attn.q_proj.weight"] is found["model.layers.0.self_attn.v_proj.weight"]
    # The first block's attention reads the normalised embeddings, which are had without a model.
    x = model.model.embed_tokens.weight.detach().double()[tokens.flatten()]
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    moments = x.T @ x
    metric = moments / moments.diagonal().mean() + DAMPING * torch.eye(32)
    factor = found["model.layers.0.self_attn.q_proj.weight"].values
    assert torch.allclose(factor.T @ factor, metric, atol=1e-5)
    assert torch.equal(torch.triu(factor), factor)
    # On average over directions a change counts as long as it is.
    assert float((upper_factor(moments).T @ upper_factor(moments)).diagonal().mean()) == pytest.approx(1 + DAMPING)

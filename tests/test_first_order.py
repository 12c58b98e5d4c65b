"""The first-order part of an effect, against the loss itself a little to both sides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import first_order  # noqa: E402

sys.path.remove(BENCHMARKS)

from geoquant.model.walk import read_weight, site_modules, write_weight  # noqa: E402
from oracles.models import build, tokens_for  # noqa: E402


def loss(model, tokens) -> float:
    """Nats a token."""
    logits = model(tokens, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_slope_of_the_loss_along_the_error(name):
    """GPT-2 keeps its weights transposed, some of them square."""
    model, tokens = build(name).double(), tokens_for(3, 12)
    changes = {site: first_order.error(model, site, 3) for site in site_modules(model)}
    found = first_order.first_order(model, tokens, changes)
    for slope, (site, change) in zip(found, changes.items()):
        module, sides = site_modules(model)[site], []
        weight = read_weight(module)
        for sign in (1, -1):
            write_weight(module, weight + sign * 1e-3 * change)
            sides.append(loss(model, tokens))
        write_weight(module, weight)
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=2e-2, abs=1e-5)

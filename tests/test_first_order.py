"""The first-order part of an effect, against the loss itself a little to both sides."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from geoquant.model.walk import read_weight, site_modules, walk, write_weight
from geoquant.outliers.first_order import first_order
from geoquant.outliers.interventions import rounded
from oracles.models import build, tokens_for


def losses(model, tokens) -> torch.Tensor:
    """Nats a token of each window."""
    logits = model(tokens, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_slope_of_the_loss_along_the_error(name):
    """GPT-2 keeps its weights transposed, some of them square. Block inputs are kept in half precision."""
    model, tokens = build(name), tokens_for(3, 12)
    found = first_order(model, walk(model, tokens[:1]), tokens, (2, 3))
    exact = deepcopy(model).double()
    assert {site for site, _ in found} == set(site_modules(model))
    largest = max(abs(one) for windows in found.values() for one in windows)
    for (site, bits), windows in found.items():
        module, sides = site_modules(exact)[site], []
        weight = read_weight(site_modules(model)[site])
        change = (rounded(weight, bits) - weight).double()
        with torch.no_grad():
            for sign in (1, -1):
                write_weight(module, weight.double() + sign * 1e-3 * change)
                sides.append(losses(exact, tokens))
            write_weight(module, weight.double())
        slopes = (sides[0] - sides[1]) / 2e-3
        torch.testing.assert_close(torch.tensor(windows).double(), slopes, rtol=0.05, atol=0.02 * largest)

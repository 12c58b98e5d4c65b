"""A super weight that was planted is found, and zeroing it does what zeroing it by hand does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import tiny_llama
from geoquant.model.walk import read_weight, write_weight
from geoquant.outliers.origin import Settings, origins
from geoquant.outliers.super_weight import (
    Effect,
    SuperWeights,
    effect,
    largest_term,
    like_sized,
    random_places,
    zeroed,
)
from oracles.models import build, tokens_for

BLOCK, MARK, POSITION, DIMENSION, UNIT, CHANNEL = 2, 77, 5, 11, 30, 3


def planted():
    """A Llama in which one token alone switches a hidden unit of one block on, and one weight makes that massive.

    The token's embedding is the only one along CHANNEL, which no block writes to and only the UNIT of BLOCK reads.
    """
    model = tiny_llama(num_hidden_layers=4, vocab_size=200, pad_token_id=1)
    layers = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, CHANNEL] = 0.0
        model.model.embed_tokens.weight[MARK, CHANNEL] = 2.0
        for layer in layers:
            layer.self_attn.o_proj.weight[CHANNEL] = 0.0
            layer.mlp.down_proj.weight[CHANNEL] = 0.0
        mlp = layers[BLOCK].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[UNIT] = 0.0
            projection.weight[UNIT, CHANNEL] = 3.0
        mlp.down_proj.weight[DIMENSION, UNIT] = 3e4
    return model


def text(windows=4, length=24):
    tokens = torch.randint(2, 76, (windows, length), generator=torch.Generator().manual_seed(0))
    tokens[:, POSITION] = MARK
    return tokens


def losses(model, tokens):
    """Mean loss of each window, by torch's own function on the model's own logits."""
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return torch.stack([nn.functional.cross_entropy(row, own[1:]) for row, own in zip(logits, tokens)])


def test_the_planted_weight_is_found_and_its_effect_is_that_of_zeroing_it_by_hand():
    model, tokens = planted(), text()
    before = copy.deepcopy(model.state_dict())
    found = origins(model, tokens, Settings(peers=2, many=9))
    assert found.notes == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    life = found.residuals.lives[0]
    assert (life.dimension, life.born, life.position, life.windows) == (DIMENSION, BLOCK, POSITION, 1.0)
    assert life.died is None
    assert len(found.residuals.lives) == 1
    (weight,) = found.super_weights.found
    assert (weight.block, weight.dimension, weight.position) == (BLOCK, DIMENSION, POSITION)
    assert weight.site == f"model.layers.{BLOCK}.mlp.down_proj"
    assert (weight.row, weight.column, weight.rank) == (DIMENSION, UNIT, 1)
    assert weight.weight == 3e4
    assert weight.share == pytest.approx(1, abs=0.01)
    assert weight.removed == pytest.approx(1, abs=0.01)
    plain = losses(model, tokens)

    def by_hand(places):
        changed = planted()
        matrix = changed.model.layers[BLOCK].mlp.down_proj.weight
        with torch.no_grad():
            for place in places:
                matrix[place] = 0.0
        return losses(changed, tokens) - plain

    own = model.model.layers[BLOCK].mlp.down_proj.weight.detach()
    place = (DIMENSION, UNIT)
    trials = [(weight.zeroing, [place]), *zip(weight.like_sized, [[p] for p in like_sized(own, place, 2)], strict=True)]
    for effect_found, places in trials:
        expected = by_hand(places)
        assert effect_found.windows == pytest.approx(expected.tolist(), abs=1e-4)
        assert effect_found.delta == pytest.approx(expected.mean().item(), abs=1e-4)
        assert effect_found.error == pytest.approx(expected.std().item() / 2, abs=1e-4)
    assert abs(weight.zeroing.delta) > 0.01
    assert abs(weight.random.delta) < abs(weight.zeroing.delta)
    assert weight.many == 9


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("phi", "model.layers.1.mlp.fc2"),
        ("gemma3", "model.layers.1.self_attn.o_proj"),
        ("qwen2 moe", "model.layers.1.mlp.shared_expert.down_proj"),
    ],
)
def test_whatever_the_sites_are_called(name, site):
    """Transposed weights, biases, a norm behind the site, an expert that all tokens share."""
    tokens, place = tokens_for(4, 20), (DIMENSION, 7)

    def changed(value):
        model = build(name)
        module = model.get_submodule(site)
        weight = read_weight(module)
        weight[place] = value
        write_weight(module, weight)
        if name == "gemma3":  # the norm behind the site keeps its output small but for this gain
            with torch.no_grad():
                model.model.layers[1].post_attention_layernorm.weight[DIMENSION] = 300.0
        return model

    settings = Settings(massive=100.0, peers=0, many=1)
    found = origins(changed(1e5), tokens, settings)
    first = found.super_weights.found[0]
    assert (first.site, first.row, first.column, first.rank) == (site, *place, 1)
    assert first.removed > 0.5
    expected = losses(changed(0.0), tokens) - losses(changed(1e5), tokens)
    assert first.zeroing.windows == pytest.approx(expected.tolist(), abs=2e-3)
    assert expected.abs().max() > 0.05


def test_experts_that_are_no_sites_are_not_blamed_on_others():
    model = build("qwen2 moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, DIMENSION, 7] = 1e6
    found = origins(model, tokens_for(4, 20), Settings(peers=0, many=1))
    life = found.residuals.lives[0]
    assert (life.dimension, life.born) == (DIMENSION, 1)
    assert found.super_weights.found == ()
    assert found.notes == (f"no weight of the sites of model.layers.1 was found behind the birth of {DIMENSION}",)


def test_sinks_and_massive_activations_are_told_together():
    """Attention that is made to fall on the marked token from the block on that reads it."""
    model = planted()
    with torch.no_grad():
        # The massive coordinate outshines all others behind the norm: keys that read it stand out whatever the query.
        layer = model.model.layers[BLOCK + 1].self_attn
        layer.q_proj.weight.zero_()
        layer.q_proj.bias = nn.Parameter(torch.ones(32))
        layer.k_proj.weight[:, DIMENSION] = 3.0
    tokens = text()
    tokens[:, 0], tokens[:, POSITION] = MARK, 9
    found = origins(model, tokens, Settings(peers=0, many=1))
    assert found.sinks.positions == (0, 0, 0, 0)
    means = [sum(row) / len(row) for row in found.sinks.mass]
    assert means[BLOCK + 1] > 0.5
    text_found = found.findings()[6]
    expected = f"the blocks that read it (1 of 4) put {means[3]:.0%} of their attention there, the others "
    assert expected + f"{sum(means[:3]) / 3:.0%}" in text_found


def test_the_input_is_that_of_the_token_that_is_largest():
    """The mark stands elsewhere in every window, and its neighbours make it stronger in some."""
    model, tokens = planted(), text()
    tokens[:, POSITION] = 9
    for window, position in enumerate((3, 9, 14, 20)):
        tokens[window, position] = MARK
    seen = []
    down = model.model.layers[BLOCK].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    (weight,) = origins(model, tokens, Settings(peers=0, many=1)).super_weights.found
    units = seen[0][..., UNIT].abs()
    window, position = divmod(int(units.argmax()), tokens.shape[1])
    assert (weight.window, weight.position) == (window, position)
    assert abs(weight.input) == pytest.approx(units.max().item(), rel=1e-4)
    assert window > 0


def test_a_higher_threshold_finds_nothing_to_trace():
    found = origins(planted(), text(), Settings(massive=1e9))
    assert found.super_weights.found == ()
    assert "no massive activation" in found.residuals.finding()
    assert "no massive activation" in found.super_weights.finding()


def test_of_many_births_the_first_are_traced():
    model = planted()
    with torch.no_grad():
        model.model.layers[BLOCK].mlp.down_proj.weight[:8, UNIT] = torch.arange(1.0, 9.0) * 1e4
        model.model.layers[BLOCK].mlp.down_proj.weight[CHANNEL, UNIT] = 0.0
    found = origins(model, text(), Settings(births=2, peers=0, many=1))
    assert [weight.dimension for weight in found.super_weights.found] == [7, 6]
    assert sum("one too many" in note for note in found.notes) == len(found.residuals.lives) - 2 > 0


def test_without_a_second_window_there_is_no_error():
    found = origins(planted(), text(1), Settings(peers=0, many=1)).super_weights.found[0]
    assert found.zeroing.error is None
    assert not found.confirmed
    assert "+-" not in SuperWeights((found,)).finding()


def test_the_largest_term_is_that_of_all_products():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        row, x = torch.randn(2, 30, generator=generator)
        column, term = largest_term(row, x)
        products = [(row[j] * x[j]).item() for j in range(30)]
        assert term == pytest.approx(max(products, key=abs))
        assert products[column] == pytest.approx(term)


def test_weights_of_like_size_and_random_ones():
    weight = torch.tensor([[1.0, -5.0, 4.9], [0.2, 5.3, -9.0]])
    assert like_sized(weight, (0, 1), 2) == [(0, 2), (1, 1)]
    assert len(like_sized(weight, (0, 0), 99)) == 5
    counts = torch.zeros(2, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        places = random_places(weight, (1, 0), 2, generator)
        assert len(set(places)) == 2
        for place in places:
            counts[place] += 1
    assert counts[1, 0] == 0
    # 1200 draws over five places: 240 each, within four standard errors.
    others = counts[counts > 0]
    assert len(others) == 5
    assert (others - 240).abs().max() < 4 * math.sqrt(240 * 0.8)


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_zeroed_weight_comes_back_as_it_was(kind):
    torch.manual_seed(0)
    module = nn.Linear(5, 3) if kind == "linear" else Conv1D(3, 5)
    memory, before, x = module.weight.data_ptr(), module.weight.detach().clone(), torch.eye(5)
    plain = module(x).detach()
    with zeroed(module, [(2, 4), (0, 1)]):
        change = plain - module(x)
    assert change.nonzero().tolist() == [[1, 0], [4, 2]]
    assert module.weight.data_ptr() == memory
    assert torch.equal(module.weight, before)


def test_an_effect_is_paired():
    found = effect(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.5, 5.6, 9.7]))
    assert found.delta == pytest.approx(0.6)
    assert found.error == pytest.approx(0.1 / math.sqrt(3), rel=1e-5)
    assert found.clear
    assert not Effect(0.1, 0.06, ()).clear

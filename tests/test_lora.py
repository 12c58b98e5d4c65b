"""LoRA against a dense reference: the same outputs as merged weights, gradients as the chain rule has them."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geoquant.data.records import Record
from geoquant.errors import UserError
from geoquant.privacy.finetune import finetune
from geoquant.privacy.lora import SCALE, adapters, attach, merged
from geoquant.privacy.masters import Masters

TOKENS = torch.tensor([[5, 9, 2, 40, 7, 7, 300]])
RECORDS = [Record(text) for text in ("the cat sat", "a dog ran off", "birds", "some fish swim by")]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def randomised(made, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in made:
            adapter.up.copy_(torch.randn(adapter.up.shape, generator=generator) * 0.1)
    return made


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=304, n_embd=24, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model):
    """One that stores weights as (out, in), one as (in, out)."""
    return tiny_model if request.param == "llama" else tiny_gpt2()


def test_every_linear_layer_but_the_head_is_adapted(tiny_model):
    names = {adapter.name for adapter in adapters(tiny_model, 2)}
    linear = {name for name, module in tiny_model.named_modules() if isinstance(module, nn.Linear)}
    assert names == linear - {"lm_head"}
    assert len(names) == 14


def test_fresh_adapters_change_nothing(model):
    before = logits(model)
    handles = [attach(adapter) for adapter in adapters(model, 3)]
    assert torch.equal(logits(model), before)
    assert len(handles) >= 8


def test_hooks_compute_what_merged_weights_compute(model):
    """Against a copy whose weights hold the dense product, summed entry by entry in float64."""
    made = randomised(adapters(model, 3, seed=2))
    dense = copy.deepcopy(model)
    for adapter in made:
        weight = dense.get_submodule(adapter.name).weight
        update = torch.zeros(adapter.up.shape[0], adapter.down.shape[1], dtype=torch.float64)
        for column in range(3):
            update += SCALE * torch.outer(adapter.up[:, column].detach(), adapter.down[column].detach()).double()
        weight.data = (weight.data.double() + (update.T if adapter.transposed else update)).float()
    before = logits(model)
    handles = [attach(adapter) for adapter in made]
    hooked = logits(model)
    torch.testing.assert_close(hooked, logits(dense), rtol=1e-4, atol=1e-4)
    assert (hooked - before).abs().max() > 0.1
    for adapter in made:
        torch.testing.assert_close(
            merged(adapter.module.weight.data, adapter.down, adapter.up, adapter.transposed),
            dense.get_submodule(adapter.name).weight.data,
        )
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), before)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_gradients_are_those_of_the_dense_weight_through_the_product(rank, rows, columns, seed):
    """dL/dB = SCALE dL/dW A^T and dL/dA = SCALE B^T dL/dW, and the layer's own weight gets none."""
    torch.manual_seed(seed)

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(columns, rows, bias=False, dtype=torch.float64)

        def get_output_embeddings(self):
            return None

    model = One()
    model.layer.weight.requires_grad_(False)
    (adapter,) = adapters(model, rank, seed)
    down, up = (nn.Parameter(torch.randn_like(part, dtype=torch.float64)) for part in (adapter.down, adapter.up))
    object.__setattr__(adapter, "down", down)
    object.__setattr__(adapter, "up", up)
    attach(adapter)
    inputs, wanted = torch.randn(5, columns, dtype=torch.float64), torch.randn(5, rows, dtype=torch.float64)
    ((model.layer(inputs) - wanted) ** 2).sum().backward()

    weight = (model.layer.weight + SCALE * up.detach() @ down.detach()).requires_grad_(True)
    ((inputs @ weight.T - wanted) ** 2).sum().backward()
    torch.testing.assert_close(up.grad, SCALE * weight.grad @ down.detach().T)
    torch.testing.assert_close(down.grad, SCALE * up.detach().T @ weight.grad)
    assert model.layer.weight.grad is None


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is optional")
def test_peft_with_the_same_factors_gives_the_same_logits(tiny_model):
    from peft import LoraConfig, get_peft_model

    made = randomised(adapters(tiny_model, 4, seed=3))
    handles = [attach(adapter) for adapter in made]
    ours = logits(tiny_model)
    for handle in handles:
        handle.remove()
    config = LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules="all-linear", lora_dropout=0.0)
    theirs = get_peft_model(tiny_model, config).eval()
    count = 0
    for adapter in made:
        layer = theirs.get_submodule(f"base_model.model.{adapter.name}")
        layer.lora_A["default"].weight.data = adapter.down.data
        layer.lora_B["default"].weight.data = adapter.up.data
        count += 1
    assert count == sum(hasattr(module, "lora_A") for module in theirs.modules())
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-4, atol=1e-4)


def test_training_moves_the_adapted_weights_by_that_rank_and_nothing_else(model, tiny_tokenizer):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    names = {f"{adapter.name}.weight" for adapter in adapters(model, 2)}
    finetune(model, tiny_tokenizer, RECORDS, epochs=3, lr=1e-2, batch=2, lora=2)
    for name, weight in model.named_parameters():
        update = weight.detach() - before[name]
        if name in names:
            values = torch.linalg.svdvals(update.double())
            assert values[1] > 1e-4, name
            assert values[2] < 1e-5 * values[0], name
        else:
            assert torch.equal(weight, before[name]), name
        assert weight.requires_grad == flags[name]
    assert not any(module._forward_hooks for module in model.modules())


def test_lora_learns(tiny_model, tiny_tokenizer):
    seen = []
    finetune(
        tiny_model,
        tiny_tokenizer,
        RECORDS,
        epochs=25,
        lr=1e-2,
        batch=2,
        lora=8,
        progress=lambda phase, done, total, note="": seen.append(float(note.split()[1])),
    )
    assert seen[-1] < 0.5 * seen[0]


def test_at_rest_the_model_is_merged_and_at_work_it_is_not(tiny_model):
    """Whatever it computes in, nothing of the types, hooks and casts of training is left behind."""
    own = copy.deepcopy(tiny_model)
    masters = Masters(tiny_model, 2, 0, torch.bfloat16)
    with torch.no_grad():
        for value in masters.values[1::2]:
            value.fill_(0.01)
    for _ in range(2):
        masters.work()
        assert {weight.dtype for weight in tiny_model.parameters()} == {torch.bfloat16}
        assert sum(len(module._forward_hooks) for module in tiny_model.modules()) == 14
        masters.rest()
    expected = own.model.layers[0].mlp.up_proj.weight + SCALE * 0.01 * masters.values[2 * 5].sum(dim=0)
    assert [adapter.name for adapter in masters.adapters][5].endswith("0.mlp.up_proj")
    torch.testing.assert_close(tiny_model.model.layers[0].mlp.up_proj.weight, expected)
    assert torch.equal(tiny_model.model.embed_tokens.weight, own.model.embed_tokens.weight)
    assert all(weight.requires_grad for weight in tiny_model.parameters())


def test_the_same_seed_gives_the_same_factors_and_ranks_below_one_are_refused(tiny_model):
    one, same, other = (adapters(tiny_model, 2, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.down, b.down) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0].down, other[0].down)
    assert float(one[0].down.detach().abs().max()) <= 32**-0.5
    with pytest.raises(UserError, match="cannot make adapters of rank -1; wanted a whole number from 1"):
        adapters(tiny_model, -1)
    with pytest.raises(UserError, match="no linear layers"):
        adapters(Headonly(), 2)


class Headonly(nn.Module):
    """Nothing but a projection onto the vocabulary."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def get_output_embeddings(self):
        return self.head

"""All origins of one model in one stream, whatever the model is called inside."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from geoquant.errors import UserError
from geoquant.model.walk import read_weight, walk
from geoquant.outliers.origin import Settings, origins
from geoquant.outliers.outlier_ratio import outlier_ratio
from geoquant.outliers.tails import tails
from oracles.models import ARCHITECTURES, block_outputs, build, site_inputs, tokens_for

LENGTH = 20
QUICK = Settings(sizes=(16, None), massive=15.0, births=1, peers=1, many=4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_every_part(name):
    model, tokens, steps = build(name), tokens_for(4, LENGTH), []
    found = origins(model, tokens, QUICK, progress=lambda *step: steps.append(step[:3]))
    assert steps == [("origins", done, 3) for done in (1, 2, 3)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(kept["findings"]) in (6, 7)
    assert kept["windows"] == 4
    assert [len(row) for row in kept["sinks"]["mass"]] == [4 if name == "qwen2 moe" else 3] * 3
    assert None not in kept["sinks"]["value_ratio"]
    norms = sum("norm" in type(module).__name__.lower() for module in model.modules()) - 1  # without the last
    assert len(found.norms.norms) == norms
    sites = [site for block in walk(model, tokens) for site in block.sites]
    assert [item.site for item in found.outliers.sites] == [site.name for site in sites]
    assert len(found.clipping.splits) == 2 * len(sites)
    assert len(found.outliers.blocks) == 3
    assert found.notes == ()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_parts_are_those_of_the_whole_model(name):
    model, tokens = build(name), tokens_for(4, LENGTH)
    found = origins(model, tokens, QUICK)
    blocks = walk(model, tokens)
    outputs = block_outputs(model, [block.name for block in blocks], tokens)
    for index, block in enumerate(blocks):
        sizes = outputs[block.name].abs()
        assert found.residuals.largest[index + 1] == pytest.approx(sizes.max().item(), rel=1e-4)
        assert found.residuals.typical[index + 1] == pytest.approx(sizes.median().item(), rel=1e-3)
        _, position, dimension = torch.unravel_index(sizes.argmax(), sizes.shape)
        assert found.residuals.position[index + 1] == position
        assert found.residuals.dimension[index + 1] == dimension
    inputs = site_inputs(model, [site.name for block in blocks for site in block.sites], tokens)
    for item in found.outliers.sites:
        x, weight = inputs[item.site].flatten(0, -2), read_weight(model.get_submodule(item.site))
        expected = outlier_ratio([weight], [x.norm(dim=0)])
        assert (item.ratio, item.null) == pytest.approx(expected, rel=1e-3)
        assert item.tails.largest == pytest.approx(tails(x).largest, rel=1e-3)


def test_attention_that_cannot_be_seen_is_said_and_the_rest_is_there():
    """Attention that takes its own exponentials: no softmax passes."""

    def handmade(module, query, key, value, attention_mask, scaling, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        powers = (query @ key.mT * scaling).masked_fill(future, -torch.inf).exp()
        return ((powers / powers.sum(-1, keepdim=True)) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("handmade", handmade)
    model, tokens = build("llama"), tokens_for(4, LENGTH)
    plain = origins(model, tokens, QUICK)
    model.set_attn_implementation("handmade")
    found = origins(model, tokens, QUICK)
    assert found.sinks.mass == (None, None, None)
    assert "not seen in any block" in found.findings()[0]
    assert [note for note in found.notes if "attention of model.layers.1 was not seen" in note]
    assert found.residuals.largest == pytest.approx(plain.residuals.largest, rel=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_norm_that_is_none_and_logits_of_its_own_are_said():
    class ClampingNorm(nn.Module):
        def forward(self, x):
            return x.clamp(-1, 1).cumsum(-1)

    model, tokens = build("llama"), tokens_for(4, LENGTH)
    model.model.layers[1].input_layernorm = ClampingNorm()
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.flip(-1) if len(args[0].shape) > 2 else output
    )
    found = origins(model, tokens, QUICK)
    assert len(found.norms.norms) == 5
    assert any("model.layers.1.input_layernorm was not reached" in note for note in found.notes)
    assert any("super weights were not sought" in note for note in found.notes)
    assert found.super_weights.found == ()


def test_dropout_sleeps_and_wakes():
    model, tokens = build("gpt2"), tokens_for(2, LENGTH)
    model.train()
    one, other = (origins(model, tokens, QUICK).to_dict() for _ in range(2))
    assert one == other
    assert all(module.training for module in model.modules())


def test_windows_need_halves():
    with pytest.raises(UserError, match="windows of 7 tokens; wanted at least 8"):
        origins(build("llama"), tokens_for(2, 7))

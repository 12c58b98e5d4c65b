"""The sites that `walk` finds, spelled out for each architecture from its modelling code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.model.walk import find_blocks, read_weight, site_modules, untouched_parameters, walk, write_weight

PROBE = torch.arange(3, 11)[None]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = [
    ("attention_in", {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}),
    ("attention_out", {"self_attn.o_proj": (32, 32)}),
    ("mlp_in", {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}),
    ("mlp_out", {"mlp.down_proj": (32, 48)}),
]
# name: (classes, settings, path of the blocks, stages of each block in order: kind and (out, in) of each site)
CASES = {
    "llama": ("Llama", SMALL, "model.layers", LLAMA),
    "mistral": ("Mistral", SMALL | {"sliding_window": 4}, "model.layers", LLAMA),
    "qwen2": ("Qwen2", SMALL, "model.layers", LLAMA),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 8}, "model.layers", LLAMA),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 8, "sliding_window": 4}, "model.layers", LLAMA),
    "gemma3": ("Gemma3", SMALL | {"head_dim": 8, "sliding_window": 4}, "model.layers", LLAMA),
    "phi3": (
        "Phi3",
        SMALL,
        "model.layers",
        [
            ("attention_in", {"self_attn.qkv_proj": (64, 32)}),
            ("attention_out", {"self_attn.o_proj": (32, 32)}),
            ("mlp_in", {"mlp.gate_up_proj": (96, 32)}),
            ("mlp_out", {"mlp.down_proj": (32, 48)}),
        ],
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "transformer.h",
        [
            ("attention_in", {"attn.c_attn": (96, 32)}),
            ("attention_out", {"attn.c_proj": (32, 32)}),
            ("mlp_in", {"mlp.c_fc": (128, 32)}),
            ("mlp_out", {"mlp.c_proj": (32, 128)}),
        ],
    ),
    "gpt_neox": (
        "GPTNeoX",
        SMALL,
        "gpt_neox.layers",
        [
            ("attention_in", {"attention.query_key_value": (96, 32)}),
            ("attention_out", {"attention.dense": (32, 32)}),
            ("mlp_in", {"mlp.dense_h_to_4h": (48, 32)}),
            ("mlp_out", {"mlp.dense_4h_to_h": (32, 48)}),
        ],
    ),
    "gptj": (
        "GPTJ",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "transformer.h",
        [
            # Attention and MLP run side by side on one normed input.
            ("attention_in", {f"attn.{n}_proj": (32, 32) for n in "qkv"} | {"mlp.fc_in": (128, 32)}),
            ("attention_out", {"attn.out_proj": (32, 32)}),
            ("mlp_out", {"mlp.fc_out": (32, 128)}),
        ],
    ),
    "opt": (
        "OPT",
        {
            "vocab_size": 300,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
        },
        "model.decoder.layers",
        [
            ("attention_in", {f"self_attn.{n}_proj": (32, 32) for n in "qkv"}),
            ("attention_out", {"self_attn.out_proj": (32, 32)}),
            ("mlp_in", {"fc1": (48, 32)}),
            ("mlp_out", {"fc2": (32, 48)}),
        ],
    ),
}
HEADS = {"gpt2": "GPT2LMHeadModel"}
CONFIGS = {"gemma3": "Gemma3TextConfig"}


def build(name: str):
    import transformers

    family, settings, *_ = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(name, f"{family}Config"))(**settings)
    return getattr(transformers, HEADS.get(name, f"{family}ForCausalLM"))(config).eval()


@pytest.mark.parametrize("name", CASES)
def test_stages_kinds_shapes_and_fused_groups(name):
    model = build(name)
    _, _, prefix, stages = CASES[name]
    blocks = walk(model, PROBE)
    assert [block.name for block in blocks] == [f"{prefix}.0", f"{prefix}.1"]
    for block in blocks:
        assert len(block.stages) == len(stages)
        for stage, (kind, shapes) in zip(block.stages, stages):
            assert {site.name: site.shape for site in stage.sites} == {
                f"{block.name}.{n}": s for n, s in shapes.items()
            }
            assert stage.sites[0].kind == kind
            assert {site.fused for site in stage.sites} == {stage.name} == {stage.sites[0].name}
            assert {site.block for site in stage.sites} == {block.index}
            assert (stage.columns, stage.rows) == (stage.sites[0].shape[1], sum(site.shape[0] for site in stage.sites))
    assert untouched_parameters(model, blocks) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_sites_side_by_side_keep_their_own_kind():
    first = walk(build("gptj"), PROBE)[0].stages[0]
    assert {site.name.rpartition(".")[2]: site.kind for site in first.sites} == {
        "q_proj": "attention_in",
        "k_proj": "attention_in",
        "v_proj": "attention_in",
        "fc_in": "mlp_in",
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_written_weight_is_read_back_and_used(name):
    model = build(name)
    modules = site_modules(model)
    for site in walk(model, PROBE)[0].sites:
        module = modules[site.name]
        weight = torch.randn(site.shape)
        write_weight(module, weight)
        assert torch.equal(read_weight(module), weight)
        x = torch.randn(3, site.shape[1])
        torch.testing.assert_close(module(x), x @ weight.T + (0 if module.bias is None else module.bias))


def test_read_weight_is_a_float32_copy():
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    before = layer.weight.clone()
    copy = read_weight(layer)
    assert copy.dtype == torch.float32
    copy += 1
    assert torch.equal(layer.weight, before)
    write_weight(layer, copy)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, copy.to(torch.bfloat16))


def test_a_weight_of_another_shape_is_not_broadcast():
    with pytest.raises(ValueError, match=r"a weight of shape \(1, 4\) for a site of shape \(3, 4\)"):
        write_weight(nn.Linear(4, 3), torch.zeros(1, 4))


def moe(family: str, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SMALL | settings))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def test_mixtral_experts_are_one_parameter_and_are_named_as_untouched():
    model = moe("Mixtral", num_local_experts=4)
    blocks = walk(model, PROBE)
    assert [s.name for s in blocks[0].sites] == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    left = dict(untouched_parameters(model, blocks))
    assert left == {
        f"model.layers.{index}.mlp.{name}": numel
        for index in range(2)
        for name, numel in (
            ("gate.weight", 4 * 32),
            ("experts.gate_up_proj", 4 * 96 * 32),
            ("experts.down_proj", 4 * 32 * 48),
        )
    }


def test_qwen_moe_routers_are_no_sites():
    model = moe(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
    )
    blocks = walk(model, PROBE)
    names = {site.name.removeprefix("model.layers.0.") for site in blocks[0].sites}
    shared = {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")}
    assert names == {f"self_attn.{n}_proj" for n in "qkvo"} | shared
    kinds = {s.name.rpartition(".")[2]: s.kind for s in blocks[0].sites if "mlp" in s.name}
    assert kinds == {"gate_proj": "mlp_in", "up_proj": "mlp_in", "down_proj": "mlp_out"}
    left = {name.removeprefix("model.layers.0.mlp.") for name, _ in untouched_parameters(model, blocks)[:4]}
    assert left == {"gate.weight", "experts.gate_up_proj", "experts.down_proj", "shared_expert_gate.weight"}


class OldExperts(nn.Module):
    """A block whose experts are linear modules, called by keyword, one of them idle."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        busy = self.experts[0](input=x) + self.experts[2](input=x)
        return x + self.gate(x).sum() * 0 + busy


class OldModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(OldExperts() for _ in range(2))

    def forward(self, tokens, use_cache=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


def test_an_idle_expert_gets_a_stage_of_its_own_at_the_end():
    blocks = walk(OldModel(), PROBE)
    assert [[site.name for site in stage.sites] for stage in blocks[1].stages] == [
        ["blocks.1.experts.0", "blocks.1.experts.2"],
        ["blocks.1.experts.1"],
    ]
    assert [name for name, _ in untouched_parameters(OldModel(), blocks)] == [
        "blocks.0.gate.weight",
        "blocks.1.gate.weight",
    ]


def test_the_blocks_are_found_although_experts_are_longer_lists():
    assert find_blocks(OldModel())[0] == "blocks"


def test_equal_values_in_different_tensors_do_not_share_an_input():
    """Sharing is by storage: an input of zeros everywhere fuses nothing."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data.zero_()
    assert [len(stage.sites) for stage in walk(model, PROBE)[0].stages] == [3, 1, 2, 1]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"found no repeated blocks with linear layers in Sequential; wanted a decoder"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_hooks_are_removed_when_the_probe_fails():
    model = tiny_llama()
    with pytest.raises(IndexError):
        walk(model, torch.tensor([[5000]]))
    assert not any(module._forward_hooks for module in model.modules())

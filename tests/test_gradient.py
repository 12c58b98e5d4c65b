"""Gradient energies, streamed without autograd at the head, against plain autograd on the whole model."""

from __future__ import annotations

import pytest
import torch

from geoquant.errors import UserError
from geoquant.model.walk import walk
from geoquant.observe import gradient
from geoquant.observe.gradient import check_head, token_energies
from geoquant.observe.stream import open_stream
from oracles.models import ARCHITECTURES, build, gradient_energies, tokens_for


def streamed(model, tokens, compute=torch.float32, progress=lambda *_: None):
    blocks = walk(model, tokens[:1])
    stages = {stage.name: [site.name for site in stage.sites] for block in blocks for stage in block.stages}
    found = token_energies(
        model, blocks, open_stream(model, tokens, compute), tokens, compute=compute, progress=progress
    )
    return found.tokens, stages


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_energies_equal_plain_autograd(name, monkeypatch):
    """Every token of every stage; soft caps, head bias, final norm, embedding scale, tied heads, flattened experts."""
    monkeypatch.setattr(gradient, "HEAD_ROWS", 13)  # chunks that do not divide anything
    model, tokens = build(name), tokens_for(6, 18)
    found, stages = streamed(model, tokens)
    expected = gradient_energies(model, stages, tokens)
    assert found.keys() == expected.keys()
    for stage, energy in expected.items():
        assert found[stage].shape == tokens.shape
        torch.testing.assert_close(found[stage], energy / energy.mean(), rtol=2e-3, atol=1e-5)


def test_energies_have_mean_one_and_ignore_the_unscored_token():
    """Nothing is predicted after the last token, so its outputs matter to nobody."""
    found, _ = streamed(build("llama"), tokens_for(3, 12))
    for energy in found.values():
        assert energy.mean().item() == pytest.approx(1.0, abs=1e-5)
        assert energy[:, -1].abs().max() < 1e-6
        assert (energy >= 0).all()


@pytest.mark.parametrize(("share", "batches"), [(1.0, [0, 1, 2, 3, 4]), (0.5, [1, 4]), (0.01, [4]), (0.6, [0, 2, 4])])
def test_a_share_of_the_windows(share, batches):
    """Batches evenly spread, the last one among them; their energies as if they were all there is, NaN elsewhere."""
    model, tokens = build("llama"), tokens_for(10, 12)
    blocks, stream = walk(model, tokens[:1]), open_stream(model, tokens)
    found = token_energies(model, blocks, stream, tokens, compute=torch.float32, share=share).tokens
    rows = [row for batch in batches for row in (2 * batch, 2 * batch + 1)]
    part, _ = streamed(model, tokens[rows])
    for stage, energy in found.items():
        torch.testing.assert_close(energy[rows], part[stage], rtol=1e-5, atol=1e-7)
        assert energy.isnan().any(1).nonzero().flatten().tolist() == [row for row in range(10) if row not in rows]


def test_bfloat16_energies_rank_tokens_alike():
    model, tokens = build("llama"), tokens_for(4, 24)
    exact, _ = streamed(model, tokens)
    fast, _ = streamed(model, tokens, torch.bfloat16)
    for stage, energy in exact.items():
        pair = torch.stack([energy.flatten(), fast[stage].flatten()]).clamp_min(1e-6).log()
        assert torch.corrcoef(pair)[0, 1] > 0.98


def test_the_model_keeps_no_gradient_and_progress_ends():
    model, tokens = build("gpt2"), tokens_for(10, 8)
    steps = []
    streamed(model, tokens, progress=lambda phase, done, total, note="": steps.append((phase, done, total)))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert steps[-1][1] == steps[-1][2]
    assert [done for _, done, _ in steps] == list(range(1, len(steps) + 1))


def scaled(kind: str):
    """Models that scale their logits, and one that projects its states before the head."""
    import transformers

    shared = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    narrow = shared | {"intermediate_size": 40, "num_key_value_heads": 1, "initializer_range": 0.2, "pad_token_id": 1}
    torch.manual_seed(0)
    if kind == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**narrow, logit_scale=0.3)).eval()
    if kind == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**narrow, logits_scaling=4.0)).eval()
    projected = shared | {"word_embed_proj_dim": 16, "ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 1}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**projected, do_layer_norm_before=False)).eval()


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_scaled_logits(kind):
    model, tokens = scaled(kind), tokens_for(4, 12)
    check_head(model, tokens[:1, :8])
    found, stages = streamed(model, tokens)
    for stage, energy in gradient_energies(model, stages, tokens).items():
        torch.testing.assert_close(found[stage], energy / energy.mean(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_that_are_known(name):
    check_head(build(name), tokens_for(1, 8))


def test_a_head_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="OPTForCausalLM computes its logits in a way"):
        check_head(scaled("opt"), tokens_for(1, 8))


def test_a_gradient_that_is_not_finite_is_named():
    model, tokens = build("llama"), tokens_for(2, 8)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"the loss gradient at .* is not finite"):
        streamed(model, tokens)

"""Divergence against its definition on full logits of both models, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from conftest import tiny_llama
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.evaluate import perplexity as module
from geoquant.evaluate.divergence import (
    divergence,
    final_states,
    load_states,
    measure,
    measure_original,
    save_states,
)
from geoquant.evaluate.perplexity import perplexity


def make_windows(n: int = 5, length: int = 24) -> Windows:
    tokens = torch.randint(3, 300, (n, length), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, "random", "")


def changed(model, seed: int = 3, scale: float = 0.05):
    """The same model with noise on the matrices of its blocks."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def naive(original, quantized, text: Windows) -> tuple[torch.Tensor, float]:
    """KL of each window and the share of equal first choices, from full logits."""
    with torch.no_grad():
        p = original(text.tokens).logits[:, :-1].double().log_softmax(2)
        q = quantized(text.tokens).logits[:, :-1].double().log_softmax(2)
    return (p.exp() * (p - q)).sum(2).mean(1), (p.argmax(2) == q.argmax(2)).double().mean().item()


def test_equals_the_definition(tiny_model):
    text, other = make_windows(), changed(tiny_model)
    wanted, top1 = naive(tiny_model, other, text)
    found = divergence(other, text, final_states(tiny_model, text), batch=2)
    assert 0.01 < wanted.mean() < 5
    assert 0.05 < top1 < 0.95
    torch.testing.assert_close(torch.tensor(found.windows, dtype=torch.float64), wanted, rtol=1e-2, atol=1e-4)
    assert found.kl == pytest.approx(wanted.mean().item(), rel=2e-3)
    assert found.se == pytest.approx(wanted.std().item() / math.sqrt(5), rel=2e-2)
    assert found.top1 == pytest.approx(top1, abs=0.01)
    assert found.tokens == 5 * 23


def test_full_precision_states_are_exact(tiny_model):
    text, other = make_windows(), changed(tiny_model)
    with torch.no_grad():
        states = tiny_model.model(text.tokens).last_hidden_state
    found = divergence(other, text, states)
    torch.testing.assert_close(
        torch.tensor(found.windows, dtype=torch.float64), naive(tiny_model, other, text)[0], rtol=1e-4, atol=1e-6
    )


def test_a_model_does_not_diverge_from_itself(tiny_model):
    text = make_windows()
    found = divergence(tiny_model, text, final_states(tiny_model, text))
    assert abs(found.kl) < 1e-5  # what float16 states cost
    assert found.top1 > 0.98


def test_a_soft_capped_head(tiny_model):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        final_logit_softcapping=2.0,
    )
    model, text = hf.Gemma2ForCausalLM(config).eval(), make_windows()
    other = changed(model)
    found = divergence(other, text, final_states(model, text))
    assert found.kl == pytest.approx(naive(model, other, text)[0].mean().item(), rel=5e-3)


def test_a_changed_head_needs_the_original_one(tiny_model):
    """Tied embeddings that moved (anchoring) change the head as well."""
    text, other = make_windows(), changed(tiny_model)
    with torch.no_grad():
        other.lm_head.weight += 0.5 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(4)
        )
    wanted = naive(tiny_model, other, text)[0].mean().item()
    states = final_states(tiny_model, text)
    assert divergence(other, text, states, tiny_model.lm_head.weight).kl == pytest.approx(wanted, rel=2e-3)
    assert divergence(other, text, states).kl != pytest.approx(wanted, rel=2e-2)


def test_few_positions_meet_the_vocabulary_at_a_time(tiny_model, monkeypatch):
    text, other = make_windows(), changed(tiny_model)
    states = final_states(tiny_model, text)
    whole = divergence(other, text, states)
    monkeypatch.setattr(module, "VOCABULARY_CHUNK", 304 * 7)
    seen = []
    other.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.numel() // 304))
    found = divergence(other, text, states)
    assert max(seen) == 7
    assert found.kl == pytest.approx(whole.kl, rel=1e-5)
    assert found.top1 == whole.top1


def test_one_pass_gives_the_same_perplexity(tiny_model):
    text, other = make_windows(), changed(tiny_model)
    before, states = measure_original(tiny_model, text, batch=2)
    after, found = measure(other, text, states, batch=2)
    assert before == perplexity(tiny_model, text, batch=2)
    torch.testing.assert_close(
        torch.tensor(after.windows), torch.tensor(perplexity(other, text, batch=2).windows), atol=1e-5, rtol=0
    )
    assert found == divergence(other, text, states, batch=2)
    assert torch.equal(states, final_states(tiny_model, text, batch=2))
    assert states.dtype == torch.float16


def test_states_beyond_float16_stay_float32(tiny_model):
    tiny_model.model.norm.weight.data *= 1e5
    states = final_states(tiny_model, make_windows())
    assert states.dtype == torch.float32
    assert torch.isfinite(states).all()


def test_certain_predictions_do_not_become_nan():
    """Probabilities that underflow to 0 contribute 0."""
    model = tiny_llama()
    model.model.norm.weight.data *= 300.0
    other = changed(model)
    found = divergence(other, make_windows(), final_states(model, make_windows()))
    assert math.isfinite(found.kl)
    assert found.kl > 1


def test_bfloat16_models_are_compared_in_their_own_type(tiny_model):
    text = make_windows()
    model = tiny_model.to(torch.bfloat16)
    other = changed(model)
    found = divergence(other, text, final_states(model, text))
    assert found.kl == pytest.approx(naive(model, other, text)[0].mean().item(), rel=5e-2)
    assert abs(divergence(model, text, final_states(model, text)).kl) < 1e-6


def test_states_of_other_windows_are_refused(tiny_model, tmp_path):
    text = make_windows()
    states = final_states(tiny_model, text)
    save_states(tmp_path / "states.safetensors", states, text)
    assert torch.equal(load_states(tmp_path / "states.safetensors", text), states)
    other = Windows(text.tokens.roll(1, 0), "random", "")
    with pytest.raises(UserError, match="belong to another text, window length or tokenizer; delete the file"):
        load_states(tmp_path / "states.safetensors", other)
    reshaped = Windows(text.tokens.reshape(10, 12), "random", "")
    with pytest.raises(UserError, match="belong to another text"):
        load_states(tmp_path / "states.safetensors", reshaped)
    with pytest.raises(ValueError, match=r"states of \(5, 24\) windows for \(10, 12\)"):
        divergence(tiny_model, reshaped, states)

"""Perplexity against transformers' own loss on the same windows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conftest import tiny_llama
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.evaluate import perplexity as module
from geoquant.evaluate.perplexity import Perplexity, check_head, difference, head_nll, perplexity


def make_windows(n: int = 5, length: int = 24, vocabulary: int = 300) -> Windows:
    tokens = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, "random", "")


def own_losses(model, text: Windows) -> torch.Tensor:
    """Each window's loss as transformers computes it from `labels`."""
    with torch.no_grad():
        return torch.tensor([model(w[None], labels=w[None]).loss.item() for w in text.tokens], dtype=torch.float64)


def tiny(architecture: str):
    """Models that do something to their logits after the head."""
    import transformers as hf

    common = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kinds = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**common, head_dim=8, final_logit_softcapping=2.0)),
        "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**common, logit_scale=0.25)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**common, logits_scaling=3.0)),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**common)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=300,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                init_std=0.3,
            )
        ),
    }
    torch.manual_seed(0)
    model = kinds[architecture]().eval()
    if architecture == "phi":  # its head has a bias, zero at first
        model.lm_head.bias.data.normal_()
    return model


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "opt"])
def test_equals_transformers_own_loss(architecture):
    model, text = tiny(architecture), make_windows()
    found, wanted = perplexity(model, text, batch=2), own_losses(model, text)
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.tensor(found.windows, dtype=torch.float64), wanted, atol=2e-5, rtol=0)
    assert found.nll == pytest.approx(wanted.mean().item(), abs=2e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted.mean().item()), rel=1e-4)
    assert found.se == pytest.approx(wanted.std().item() / math.sqrt(5), abs=2e-5)
    assert found.tokens == 5 * 23


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_batch_size_changes_nothing(tiny_model, batch):
    text = make_windows()
    torch.testing.assert_close(
        torch.tensor(perplexity(tiny_model, text, batch=batch).windows),
        torch.tensor(perplexity(tiny_model, text).windows),
        atol=1e-5,
        rtol=0,
    )


def test_few_positions_meet_the_vocabulary_at_a_time(tiny_model, monkeypatch):
    monkeypatch.setattr(module, "VOCABULARY_CHUNK", 304 * 7)
    seen = []
    tiny_model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.numel() // 304))
    text = make_windows()
    found = perplexity(tiny_model, text)
    assert max(seen) == 7
    assert found.nll == pytest.approx(own_losses(tiny_model, text).mean().item(), abs=2e-5)


def test_head_nll_is_minus_the_log_probability(tiny_model):
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(9)
    with torch.no_grad():
        wanted = -torch.log_softmax(tiny_model.lm_head(hidden).double(), 1)[torch.arange(9), targets]
        torch.testing.assert_close(head_nll(tiny_model, hidden, targets).double(), wanted, atol=1e-5, rtol=0)


def test_an_unknown_change_of_the_logits_is_refused(tiny_model):
    forward = tiny_model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.roll(1, -1)
        return out

    tiny_model.forward = changed
    with pytest.raises(UserError, match=r"^LlamaForCausalLM changes its logits in a way that GeoQuant does not know"):
        perplexity(tiny_model, make_windows())


def test_a_destroyed_model_is_measured_not_refused(tiny_model):
    tiny_model.model.norm.weight.data.fill_(float("nan"))
    check_head(tiny_model, make_windows().tokens)
    assert math.isnan(perplexity(tiny_model, make_windows()).nll)
    loud = tiny_llama()
    loud.model.norm.weight.data.fill_(1e5)
    assert math.isfinite(perplexity(loud, make_windows()).perplexity)


def test_progress_counts_windows(tiny_model):
    calls = []
    perplexity(tiny_model, make_windows(), batch=2, progress=lambda *a: calls.append(a))
    assert calls == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]


def test_one_window_has_no_spread(tiny_model):
    assert perplexity(tiny_model, make_windows(n=1)).se == 0.0


def test_difference_is_paired():
    before = Perplexity(0, 0, 0, 0, (1.0, 2.0, 4.0))
    after = dataclasses.replace(before, windows=(1.5, 2.5, 4.5))
    assert difference(before, after) == {"value": 0.5, "se": 0.0}
    found = difference(before, dataclasses.replace(before, windows=(1.0, 3.0, 6.0)))
    assert found["value"] == pytest.approx(1.0)
    assert found["se"] == pytest.approx(1 / math.sqrt(3))

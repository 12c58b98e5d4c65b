"""Tiny models of every kind that streams, and what the whole model does, seen through hooks and plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = [
    "ARCHITECTURES",
    "block_outputs",
    "build",
    "gradient_energies",
    "moments_by_hand",
    "site_inputs",
    "tokens_for",
]

VOCAB = 61
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(SHARED | {"tie_word_embeddings": False} | changes)))


def _mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SHARED, sliding_window=5))


def _qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SHARED))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def _gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(**SHARED, **caps, sliding_window=5))


def _gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHARED, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=8))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=3, n_positions=64, n_inner=40, initializer_range=0.2
    )
    return GPT2LMHeadModel(config)


def _phi():
    from transformers import PhiConfig, PhiForCausalLM

    settings = {name: value for name, value in SHARED.items() if name not in ("num_key_value_heads", "head_dim")}
    model = PhiForCausalLM(PhiConfig(**settings))
    nn.init.normal_(model.lm_head.bias, std=1.0)
    return model


def _qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    settings = {name: value for name, value in SHARED.items() if name != "head_dim"} | {"num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, **experts, shared_expert_intermediate_size=16))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama tied": lambda: _llama(tie_word_embeddings=True),
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "phi": _phi,
    "qwen2 moe": _qwen2_moe,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model in evaluation mode; norm gains are random too, so that a forgotten one is noticed."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if "norm" in label or "ln_" in label:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float().eval()


def tokens_for(windows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def _watch(model: nn.Module, names: Iterable[str], tokens: Tensor, pick) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, pick(args, output))

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def site_inputs(model: nn.Module, names: Iterable[str], tokens: Tensor) -> dict[str, Tensor]:
    """Input (tokens, in) of each named module in one forward pass of the whole model."""
    return _watch(model, names, tokens, lambda args, output: args[0].flatten(0, -2))


def block_outputs(model: nn.Module, names: Iterable[str], tokens: Tensor) -> dict[str, Tensor]:
    """Output (n, length, hidden) of each named block in one forward pass of the whole model."""
    return _watch(model, names, tokens, lambda args, output: output[0] if isinstance(output, tuple) else output)


def gradient_energies(model: nn.Module, stages: dict[str, list[str]], tokens: Tensor) -> dict[str, Tensor]:
    """`||dL/dy_t||^2` per token, summed over a stage's sites, L the summed next-token loss of its logits."""
    outputs: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [
        model.get_submodule(site).register_forward_hook(keep(site)) for sites in stages.values() for site in sites
    ]
    logits = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    model.zero_grad(set_to_none=True)
    return {
        stage: sum(outputs[site].grad.square().sum(-1).view(tokens.shape) for site in sites)
        for stage, sites in stages.items()
    }


def moments_by_hand(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_t w_t x_t x_t^T`, one token at a time, in double precision."""
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for index, x in enumerate(inputs.double()):
        total += torch.outer(x, x) * (1.0 if weights is None else float(weights[index]))
    return total

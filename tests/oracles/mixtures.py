"""Tiny random mixtures of experts, whose experts transformers keeps stacked in one parameter."""

from __future__ import annotations

import torch
import transformers

SHARED = {
    "vocab_size": 304,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "intermediate_size": 24,
}


def mixture(kind: str, experts: int = 4, seed: int = 0):
    """A tiny random mixture of experts."""
    own = {
        "Mixtral": {"num_local_experts": experts},
        "Qwen2Moe": {"num_experts": experts, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
        "GptOss": {"num_local_experts": experts, "head_dim": 8},
    }[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHARED, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(0, 0.15)
            elif not parameter.isfinite().all():  # left as it was in memory
                parameter.zero_()
    return model.eval()

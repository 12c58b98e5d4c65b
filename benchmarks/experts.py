"""What can be measured of a mixture of experts: routing, rounding, drift, and whether smoothing its estimates helps.

    python benchmarks/experts.py

Trains a small Mixtral and a small Qwen MoE here (8 experts, two a token) on walks over two halves of an alphabet, then
prints for each block: routing frequencies; the pair of experts most often chosen together against rewired choices; MD
of experts rounded to 3 bits, weighted by frequency, against noise as long; the drift of leading subspaces within a
topic and to the other one against that of as many tokens without drift; and the error of input covariances estimated
from few tokens, with and without one step on the co-activation graph.
"""

from __future__ import annotations

import torch

from geoquant.geometry.distortion import expert_distortion
from geoquant.geometry.experts import (
    averaged,
    coactivation,
    drift,
    drift_null,
    frequencies,
    neighbourhood,
    no_inputs,
    rewired,
    smoothed,
)
from geoquant.geometry.metric import judged_distortion
from geoquant.observe.routing import expert_matrices, experts_of, routed

EXPERTS, COLUMNS, LEADING = 8, 48, 4
STEPS = 150


def main() -> None:
    """Train both and print."""
    for kind in ("mixtral", "qwen"):
        model, loss = trained(kind)
        print(f"## {kind}: loss {loss:.2f} nats (chance 4.16)\n")
        for block, (name, experts) in enumerate(experts_of(model).items()):
            show(model, block, name, experts)


def topic(which: int, count: int, generator: torch.Generator, length: int = 32) -> torch.Tensor:
    """Walks over half of the alphabet, each step one of three ahead."""
    steps = torch.randint(1, 4, (count, length), generator=generator)
    return (steps.cumsum(1) + torch.randint(32, (count, 1), generator=generator)) % 32 + 32 * which


def trained(kind: str):
    """The model and its last training loss."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    common = {
        "vocab_size": 64,
        "hidden_size": COLUMNS,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=EXPERTS))
    else:
        own = {"num_experts": EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **own, decoder_sparse_step=1))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        tokens = torch.cat([topic(which, 12, generator) for which in (0, 1)])
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), loss.item()


def show(model, block: int, name: str, experts) -> None:
    """The figures of one block."""
    generator = torch.Generator().manual_seed(2)

    def heard(tokens):
        found = {}
        routed(model, tokens, lambda where, got: found.update({where: got}))
        return found[name]

    both = heard(torch.cat([topic(which, 200, generator) for which in (0, 1)]))
    shares = frequencies(both.chosen, EXPERTS)
    print(f"block {block}: frequencies " + " ".join(f"{share:.3f}" for share in shares))
    off = ~torch.eye(EXPERTS, dtype=torch.bool)
    together = coactivation(both.chosen, EXPERTS)
    pairs = [coactivation(rewired(both.chosen, generator), EXPERTS)[off].max().item() for _ in range(5)]
    print(f"  most common pair {together[off].max().item()} tokens; rewired {min(pairs)} to {max(pairs)}")
    for matrix, stack in expert_matrices(experts).items():
        judged = []
        for weight in stack:
            step = weight.abs().amax(1, keepdim=True) / 3
            judged.append(judged_distortion(weight, (weight / step).round() * step, generator, k=16).whole)
        own, null = (expert_distortion([getattr(each, kind) for each in judged], shares) for kind in ("md", "null_md"))
        print(f"  {matrix} at 3 bits: MD {own:.3f}, noise as long {null:.3f}")

    halves = [heard(topic(which, 200, generator)) for which in (0, 0, 1)]
    states = [averaged(no_inputs(EXPERTS, COLUMNS), each.inputs, each.chosen) for each in halves]
    used = [expert for expert in range(EXPERTS) if min(state.tokens[expert] for state in states) > 50]
    for expert in used:
        first, *others = (state.covariances[expert] for state in states)
        worth = [state.tokens[expert].item() for state in states]
        told = []
        for other, count in zip(others, worth[1:], strict=True):
            null = drift_null(first, (worth[0], count), LEADING, generator)
            told.append(f"{drift(first, other, LEADING):.3f} (no drift: up to {null.max():.3f})")
        print(f"  expert {expert}: drift within the topic {told[0]}, to the other {told[1]}")

    truth = averaged(no_inputs(EXPERTS, COLUMNS), both.inputs, both.chosen, 1e9)
    seen = [expert for expert in range(EXPERTS) if truth.tokens[expert] > 50]
    norm = truth.covariances[seen].flatten(1).norm(dim=1)
    for count in (64, 256, 1024, 4096):
        errors = []
        for _ in range(10):
            pick = torch.randint(len(both.inputs), (count,), generator=generator)
            few = averaged(no_inputs(EXPERTS, COLUMNS), both.inputs[pick], both.chosen[pick], 1e9).covariances
            mixed = smoothed(few, neighbourhood(coactivation(both.chosen[pick], EXPERTS)))
            gap = [(each - truth.covariances)[seen].flatten(1).norm(dim=1) / norm for each in (few, mixed)]
            errors.append(torch.stack(gap).mean(1))
        plain, smooth = torch.stack(errors).mean(0).tolist()
        print(f"  covariance from {count} tokens: relative error {plain:.3f}, smoothed {smooth:.3f}")
    print()


if __name__ == "__main__":
    main()

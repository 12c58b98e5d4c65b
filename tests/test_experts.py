"""Experts: counting by hand, averages in closed form, subspaces turned by a known angle, and small trained mixtures."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.geometry.distortion import expert_distortion
from geoquant.geometry.experts import (
    averaged,
    choose,
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
from test_tangent import generator

EXPERTS = 4


def topic(which, count, length=24, seed=0):
    """Walks over one of two halves of the alphabet, each step one of three ahead."""
    steps = torch.randint(1, 4, (count, length), generator=generator(seed))
    return (steps.cumsum(1) + torch.randint(32, (count, 1), generator=generator(seed + 1))) % 32 + 32 * which


@pytest.fixture(scope="module", params=["mixtral", "qwen"])
def mixture(request):
    """A small mixture of experts, trained on both topics until it predicts better than chance."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
    torch.manual_seed(0)
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=EXPERTS))
    else:
        shared = {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **shared, decoder_sparse_step=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        tokens = torch.cat([topic(which, 8, seed=10 * step + which) for which in (0, 1)])
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.5  # chance is ln 64 = 4.2
    return model.eval()


def heard(model, tokens):
    """What each module of experts got, by name."""
    found = {}
    routed(model, tokens, lambda name, got: found.update({name: got}))
    return found


def test_choices_are_those_of_the_router_logits(mixture):
    tokens = topic(0, 3, seed=900)
    found = heard(mixture, tokens)
    with torch.no_grad():
        logits = mixture(tokens, output_router_logits=True).router_logits
    assert len(found) == len(logits) == 2
    for got, scores in zip(found.values(), logits, strict=True):
        counts, pairs = Counter(), Counter()
        for row in scores.view(-1, EXPERTS).tolist():
            best = sorted(range(EXPERTS), key=lambda expert: -row[expert])[:2]
            counts.update(best)
            pairs.update([(a, b) for a in best for b in best])
        expected = torch.tensor([counts[expert] / (2 * tokens.numel()) for expert in range(EXPERTS)]).double()
        torch.testing.assert_close(frequencies(got.chosen, EXPERTS), expected)
        together = coactivation(got.chosen, EXPERTS)
        assert together.tolist() == [[pairs[a, b] for b in range(EXPERTS)] for a in range(EXPERTS)]
        assert torch.equal(choose(scores.view(-1, EXPERTS), 2).sort(1).values, got.chosen.sort(1).values)


def test_matrices_are_those_the_experts_multiply_with(mixture):
    name, experts = next(iter(experts_of(mixture).items()))
    got = heard(mixture, topic(1, 2, seed=901))[name]
    matrices = expert_matrices(experts)
    assert matrices["gate_up_proj"].shape == (EXPERTS, 48, 32)
    assert matrices["down_proj"].shape == (EXPERTS, 32, 24)
    with torch.no_grad():
        for expert in range(EXPERTS):
            whole = torch.full((len(got.inputs), 1), expert)
            out = experts(got.inputs, whole, torch.ones(len(got.inputs), 1))
            gate, up = (got.inputs @ matrices["gate_up_proj"][expert].T).chunk(2, dim=1)
            mine = (torch.nn.functional.silu(gate) * up) @ matrices["down_proj"][expert].T
            torch.testing.assert_close(mine, out, rtol=1e-4, atol=1e-5)
    matrices["down_proj"].zero_()
    assert experts.down_proj.any()


def test_distortion_of_rounded_experts_is_weighted_by_their_frequency(mixture):
    name, experts = next(iter(experts_of(mixture).items()))
    got = heard(mixture, torch.cat([topic(which, 8, seed=902) for which in (0, 1)]))[name]
    shares = frequencies(got.chosen, EXPERTS).tolist()
    found = []
    for matrix in expert_matrices(experts)["gate_up_proj"]:
        step = matrix.abs().max() / 3
        found.append(judged_distortion(matrix, (matrix / step).round() * step, generator(), k=12).whole)
    total = expert_distortion([each.md for each in found], shares)
    assert min(each.md for each in found) <= total <= max(each.md for each in found)
    assert total == pytest.approx(sum(share * each.md for share, each in zip(shares, found, strict=True)))
    # Rounding noise knows of no tangent space.
    assert all(each.ratio == pytest.approx(1, abs=0.15) for each in found)


def test_inputs_turn_when_the_topic_does_and_not_before(mixture):
    """Leading directions of the busiest expert's inputs: first half, second half, then the other topic."""
    name = list(experts_of(mixture))[-1]
    got = [heard(mixture, topic(which, 60, seed=seed))[name] for which, seed in ((0, 903), (0, 905), (1, 907))]
    expert = int(sum(coactivation(each.chosen, EXPERTS).diagonal().clamp_min(1).log() for each in got).argmax())
    states = [averaged(no_inputs(EXPERTS, 32), each.inputs, each.chosen, 1e6) for each in got]
    same, other = (drift(states[0].covariances[expert], each.covariances[expert], 3) for each in states[1:])
    worth = states[0].tokens[expert].item(), states[1].tokens[expert].item()
    null = drift_null(states[0].covariances[expert], worth, 3, generator())
    assert other > null.max()
    assert other > 2 * same


def test_no_experts_no_choice():
    with pytest.raises(UserError, match="found no stacked experts in LlamaForCausalLM"):
        experts_of(tiny_llama())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 4), experts=st.integers(5, 9))
def test_rewiring_keeps_both_margins(seed, k, experts):
    chosen = torch.rand(40, experts, generator=generator(seed)).argsort(1)[:, :k]
    mixed = rewired(chosen, generator(seed + 1))
    assert torch.equal(frequencies(mixed, experts), frequencies(chosen, experts))
    assert (mixed.sort(1).values.diff(dim=1) > 0).all()


def test_rewiring_parts_those_that_always_go_together():
    """Two couples of equal frequency: of the C(4, 2) = 6 pairs each must get a share of about 1/6."""
    chosen = torch.tensor([[0, 1], [2, 3]]).repeat(600, 1)
    assert coactivation(chosen, 4)[0].tolist() == [600, 600, 0, 0]
    pairs = coactivation(rewired(chosen, generator(1)), 4)
    off = pairs[~torch.eye(4, dtype=torch.bool)].double() / 1200
    torch.testing.assert_close(off, torch.full((12,), 1 / 6).double(), rtol=0, atol=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(0, 50), half_life=st.floats(0.5, 100))
def test_averages_are_the_closed_form_however_tokens_are_cut(seed, cut, half_life):
    x = torch.randn(50, 4, generator=generator(seed), dtype=torch.float64)
    chosen = torch.rand(50, 3, generator=generator(seed + 1)).argsort(1)[:, :2]
    state = averaged(no_inputs(4, 4), x[:cut], chosen[:cut], half_life)
    state = averaged(state, x[cut:], chosen[cut:], half_life)
    for expert in range(3):
        own = [row for row, picks in zip(x, chosen, strict=True) if expert in picks.tolist()]
        weights = [0.5 ** (age / half_life) for age in range(len(own))][::-1]
        expected = sum(weight * torch.outer(row, row) for weight, row in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(state.covariances[expert], expected)
        assert state.tokens[expert].item() == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))
    assert not state.covariances[3].any()
    assert state.tokens[3] == 0


@pytest.mark.parametrize("angle", [1e-6, 0.3, 1.2])
def test_drift_is_the_sine_of_the_planted_angle(angle):
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator(2), dtype=torch.float64)).Q
    values = torch.tensor([9.0, 8, 7, *[0.5] * 9], dtype=torch.float64)
    turned = basis.clone()
    turned[:, 2] = math.cos(angle) * basis[:, 2] + math.sin(angle) * basis[:, 5]
    turned[:, 5] = math.cos(angle) * basis[:, 5] - math.sin(angle) * basis[:, 2]
    before, after = ((each * values) @ each.T for each in (basis, turned))
    assert drift(before, after, 3) == pytest.approx(math.sin(angle), rel=1e-6)
    assert drift(before, 4 * before, 3) < 1e-7
    assert math.isnan(drift(before, torch.outer(basis[:, 0], basis[:, 0]), 2))


def test_the_null_of_drift_is_that_of_as_many_tokens():
    """Two samples of one distribution, 40 times: above the 95th of 100 null draws in 2 of them, not in 8 (p < 1e-3).

    More tokens turn less, as one over the root of their number.
    """
    root = torch.diag(torch.tensor([3.0, 2.5, *[1.0] * 8], dtype=torch.float64))

    def sample(tokens, seed):
        x = torch.randn(tokens, 10, generator=generator(seed), dtype=torch.float64) @ root
        return x.T @ x / tokens

    null = drift_null(root @ root, (60, 200), 2, generator(3), draws=100)
    high = sum(drift(sample(60, 10 + seed), sample(200, 500 + seed), 2) > null.quantile(0.95) for seed in range(40))
    assert high < 8
    more = drift_null(root @ root, (6000, 20000), 2, generator(4), draws=20)
    assert null.median() / more.median() == pytest.approx(10, rel=0.35)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 3))
def test_smoothing_keeps_the_mean_by_frequency(seed, k):
    chosen = torch.rand(30, 6, generator=generator(seed)).argsort(1)[:, :k]
    chosen = torch.where(chosen == 5, 4 if k == 1 else chosen, chosen)
    steps = neighbourhood(coactivation(chosen, 6))
    torch.testing.assert_close(steps.sum(1), torch.ones(6).double())
    shares, values = frequencies(chosen, 6), torch.randn(6, 2, 2, generator=generator(seed)).double()
    after = smoothed(values, steps)
    torch.testing.assert_close((shares @ after.flatten(1)), shares @ values.flatten(1))
    torch.testing.assert_close(after[1], sum(steps[1, other] * values[other] for other in range(6)))
    if k == 1:
        torch.testing.assert_close(after, values)
    else:
        used = coactivation(chosen, 6).diagonal() > 0
        torch.testing.assert_close(steps.diagonal()[used], torch.full((int(used.sum()),), 1 / k).double())


def test_smoothing_keeps_the_mean_of_a_doubly_stochastic_graph():
    ring = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]).repeat(5, 1)
    steps = neighbourhood(coactivation(ring, 4))
    torch.testing.assert_close(steps.sum(0), torch.ones(4).double())
    values = torch.tensor([1.0, 2, 3, 10]).double()
    torch.testing.assert_close(smoothed(values, steps), torch.tensor([3.5, 2, 4.5, 6]).double())
    alone = neighbourhood(coactivation(ring, 6))
    torch.testing.assert_close(alone[4:, 4:], torch.eye(2).double())

"""Statistics of stacked experts, each against autograd of its own tokens one by one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.model.walk import find_blocks, walk
from geoquant.observe.backward import backward
from geoquant.observe.experts import eager_experts, find_experts, read_site
from geoquant.observe.routing import experts_of, routed
from geoquant.observe.texts import padded
from geoquant.outliers.appraise import Collected
from geoquant.outliers.statistics import total
from oracles.mixtures import mixture


def sequences(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def collected(model, texts: dict, parts: int = 2):
    """All statistics of all sites, and the experts."""
    probe = torch.tensor([next(iter(texts.values()))[0][:8]])
    blocks = walk(model, probe)
    experts = find_experts(model, blocks, probe)
    found = {}
    known = Collected(parts)
    given = {name: padded(text, 1) for name, text in texts.items()}
    for block in backward(model, blocks, given, known.see, experts=experts):
        for site in (*block.sites, *(one.site for one in experts.get(block.index, ()))):
            for text in texts:
                found[site.name, text] = known.of(site.name, text)
        known.clear()
    return found, {one.site.name: one for many in experts.values() for one in many}


def gradients(model, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Of the loss summed over all texts, of every stack, by plain autograd of the whole model, a text at a time."""
    model.zero_grad()
    with eager_experts(model):
        for text in texts:
            ids = torch.tensor([text])
            model(ids, labels=ids).loss.mul(len(text) - 1).backward()
    return {name: own.grad.clone() for name, own in model.named_parameters() if own.ndim == 3}


def chosen(model, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """How many tokens reach each expert, by the module of experts, as the router says."""
    counts = {}
    for text in texts:

        def take(name, got):
            found = torch.bincount(got.chosen.flatten(), minlength=4)
            counts[name] = counts.get(name, 0) + found

        routed(model, torch.tensor([text]), take)
    return counts


@pytest.fixture
def exact(monkeypatch):
    """What enters a block is kept as it is: half precision can send a token elsewhere."""
    monkeypatch.setattr("geoquant.observe.backward.KEPT", torch.float32)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "GptOss"])
def test_an_expert_sees_its_own_tokens_and_their_gradients(kind):
    """Texts of different lengths, so that fillers are routed too and must not count."""
    model = mixture(kind)
    texts = {"public": sequences(0, [24] * 4), "private": sequences(1, [5, 17, 9, 30])}
    found, experts = collected(model, texts)
    assert len(experts) == 2 * 4 * 2  # blocks, experts, matrices of each
    for text, own in texts.items():
        expected, counts = gradients(model, own), chosen(model, own)
        for name, expert in experts.items():
            parts = found[name, text]
            gradient = expected[expert.stack][expert.index]
            gradient = gradient.T if expert.across else gradient
            assert sum(part.tokens for part in parts) == counts[expert.stack.rpartition(".")[0]][expert.index]
            assert total(parts).gradient.shape == expert.site.shape == read_site(model, expert.site, experts).shape
            assert (total(parts).gradient - gradient).norm() < 1e-4 * gradient.norm()


def each_token(model, module, ids):
    """(expert, input, gradient at the output of its first matrix) of every token and choice, each by its own autograd
    through a loop over tokens in place of the module.
    """
    given = {}
    hook = module.register_forward_pre_hook(lambda _, args: given.update(zip(("x", "index", "weights"), args)))
    model(ids)
    hook.remove()
    inputs, index, weights = (given[key].detach() for key in ("x", "index", "weights"))
    first, second = module.gate_up_proj.detach(), module.down_proj.detach()
    products = [[(first[e] @ x).requires_grad_() for e in own] for x, own in zip(inputs, index.tolist())]

    def replaced(*_):
        rows = []
        for own, outs, share in zip(index.tolist(), products, weights):
            halves = [out.chunk(2) for out in outs]
            parts = [w * (second[e] @ (nn.functional.silu(a) * b)) for w, e, (a, b) in zip(share, own, halves)]
            rows.append(sum(parts))
        return torch.stack(rows)

    hook = module.register_forward_hook(replaced)
    loss = model(ids, labels=ids).loss * (ids.numel() - 1)
    hook.remove()
    for x, own, outs in zip(inputs, index.tolist(), products):
        for expert, out in zip(own, outs):
            yield expert, x, torch.autograd.grad(loss, out, retain_graph=True)[0]


@pytest.mark.usefixtures("exact")
def test_sums_over_an_experts_tokens_are_those_of_a_loop_over_them():
    """Per token: the output of one expert on one token is made a leaf of its own."""
    model = mixture("Mixtral")
    texts = sequences(3, [16, 16])
    found, _ = collected(model, {"public": texts}, parts=1)
    name, module = list(experts_of(model).items())[-1]
    energies, pairs = {}, {}
    for ids in texts:
        for expert, x, g in each_token(model, module, torch.tensor([ids])):
            energies[expert] = energies.get(expert, 0) + torch.outer(g.square(), x.square())
            pairs[expert] = pairs.get(expert, 0) + g.square().sum() * torch.outer(x, x)
    assert len(energies) == 4
    for expert in energies:
        one = total(found[f"{name}.{expert}.gate_up_proj", "public"])
        assert (one.fisher - energies[expert]).norm() < 1e-4 * energies[expert].norm()
        assert (one.weighted - pairs[expert]).norm() < 1e-4 * pairs[expert].norm()


def test_a_silent_part_of_a_text_counts_with_zeros():
    known = Collected(2)
    x, g = torch.randn(6, 3), torch.randn(6, 2)
    for batch in range(4):
        known.see("public", batch, "all", x, g)
    known.see("public", 1, "rare", x, g)
    first, second = known.of("rare", "public")
    assert (first.tokens, second.tokens) == (0, 6)
    assert not first.hessian.any()
    assert first.histogram.shape == second.histogram.shape
    assert known.of("never", "public") == []


def test_stacks_that_are_no_experts_are_left_alone():
    model = tiny_llama()
    blocks = walk(model, torch.tensor([[5, 6, 7]]))
    assert find_experts(model, blocks, torch.tensor([[5, 6, 7]])) == {}
    assert len(find_blocks(model)[1]) == 2


class LinearExperts(nn.Module):
    """Experts that are linear modules, one for each token; the last one is never chosen."""

    def __init__(self, columns: int):
        super().__init__()
        self.router = nn.Parameter(torch.randn(columns, 3))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(columns, 12), nn.Linear(12, columns)) for _ in range(4))

    def forward(self, hidden):
        flat = hidden.flatten(0, -2)
        choice, out = (flat @ self.router).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            places = torch.where(choice == index)[0]
            out.index_add_(0, places, expert(flat[places]))
        return out.view_as(hidden)


@pytest.mark.usefixtures("exact")
def test_experts_that_are_linear_modules_see_their_own_tokens_too():
    model = tiny_llama()
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = LinearExperts(32)
    texts = sequences(5, [5, 17, 9, 30])
    found, experts = collected(model, {"public": texts})
    assert not experts
    model.zero_grad()
    for text in texts:
        ids = torch.tensor([text])
        model(ids, labels=ids).loss.mul(len(text) - 1).backward()
    tokens = 0
    for (name, _), parts in found.items():
        gradient = model.get_submodule(name).weight.grad
        if ".experts.3." in name:
            assert parts == []
            continue
        assert (total(parts).gradient - gradient).norm() < 1e-4 * gradient.norm()
        if re.fullmatch(r"model.layers.0.mlp.experts.\d.0", name):
            tokens += total(parts).tokens
    assert tokens == sum(map(len, texts))


def test_a_site_whose_tokens_nobody_can_name_is_refused():
    model = tiny_llama()
    block = model.model.layers[1]
    projection = block.mlp.up_proj
    block.mlp.forward = lambda hidden: torch.cat([projection(hidden[:, ::2])[..., :32]] * 2, 1)
    blocks = walk(model, torch.tensor([[5, 6, 7, 8]]))
    with pytest.raises(UserError, match=r"up_proj sees 12 of 24 tokens"):
        for _ in backward(model, blocks, {"public": padded(sequences(6, [12, 12]), 1)}, lambda *_: None):
            pass

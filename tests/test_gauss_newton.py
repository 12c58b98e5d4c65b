"""The Gauss-Newton matrix against Jacobians taken one logit at a time, the Fisher information and the KL divergence."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import tiny_llama
from geoquant.observe.gauss_newton import GaussNewton
from geoquant.outliers.curvature import model_curvature

WORDS = 11


def small_llama(**changes):
    settings = {
        "vocab_size": WORDS,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 1,
    }
    return tiny_llama(**settings | changes)


def small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    settings = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, initializer_range=0.3, **settings)).eval()


def windows(n=2, length=4):
    return torch.randint(WORDS, (n, length), generator=torch.Generator().manual_seed(0))


def dense(model, tokens, names):
    """(G, B): the definition, with one backward pass per logit."""
    weights = [dict(model.named_parameters())[name] for name in names]
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    g, factors = 0, []
    for at in logits:
        rows = [torch.autograd.grad(one, weights, retain_graph=True) for one in at]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
        p = at.detach().double().softmax(0)
        h = p.diag() - torch.outer(p, p)
        g = g + jacobian.T @ h @ jacobian / len(logits)
        factors.append((p.sqrt().diag() - torch.outer(p, p.sqrt())).T @ jacobian / len(logits) ** 0.5)
    return g, torch.cat(factors)


@pytest.fixture(scope="module")
def case():
    model, tokens = small_llama(), windows()
    operator = GaussNewton(model, tokens)
    return model, tokens, operator, *dense(model, tokens, operator.names)


def vectors(size, count=3):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_products_are_those_of_the_explicit_matrix(case):
    _, tokens, operator, g, _ = case
    assert operator.parameters == len(g) == 960
    assert operator.positions == tokens.shape[0] * (tokens.shape[1] - 1)
    for v in vectors(operator.parameters):
        close(operator.product(v), g @ v.double())


def test_the_matrix_is_symmetric_and_has_no_negative_direction(case):
    operator = case[2]
    one, other, third = vectors(operator.parameters)
    assert one @ operator.product(other) == pytest.approx((other @ operator.product(one)).item(), rel=1e-4)
    for v in (one, other, third):
        assert v @ operator.product(v) > 0


def test_the_mirror_image_is_the_other_product_of_the_same_factor(case):
    operator, b = case[2], case[4]
    assert operator.outputs == len(b)
    for u in vectors(operator.outputs):
        close(operator.to_weights(u), b.T @ u.double())
        close(operator.mirrored(u), b @ (b.T @ u.double()))


def test_the_quadratic_form_is_twice_the_divergence_of_a_small_step(case):
    """Mean of a step and of its opposite, whose odd terms cancel."""
    model, tokens, operator, *_ = case
    v = vectors(operator.parameters)[0]
    step = v * (2e-4 / (v @ operator.product(v))).sqrt()

    def log_p(sign):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, part in operator.parts(step).items():
                moved.get_parameter(name).add_(part, alpha=sign)
            return moved(tokens).logits[:, :-1].double().log_softmax(2)

    still = log_p(0)
    kl = [(still.exp() * (still - log_p(sign))).sum(2).mean().item() for sign in (1, -1)]
    assert sum(kl) / 2 == pytest.approx((step @ operator.product(step)).item() / 2, rel=0.01)


def test_the_quadratic_form_is_the_fisher_information_of_the_models_own_words(case):
    """Every word as label, weighted by its probability, instead of a Hessian of the softmax."""
    model, tokens, operator, *_ = case
    v = vectors(operator.parameters)[1]
    weights = [model.get_parameter(name) for name in operator.names]
    log_p = model(tokens).logits[:, :-1].log_softmax(2).flatten(0, 1)
    total = 0.0
    for at in log_p:
        for one in at:
            slope = torch.cat([part.flatten() for part in torch.autograd.grad(one, weights, retain_graph=True)])
            total += (one.exp() * (slope @ v).square()).item()
    assert (v @ operator.product(v)).item() == pytest.approx(total / len(log_p), rel=1e-4)


def test_chunks_change_nothing_and_fewer_parameters_are_a_block(case):
    model, tokens, operator, g, _ = case
    v = vectors(operator.parameters)[0]
    torch.testing.assert_close(GaussNewton(model, tokens, chunk=2).product(v), operator.product(v), rtol=0, atol=1e-4)
    name = "model.layers.1.mlp.down_proj.weight"
    offset = sum(operator.chosen[n].numel() for n in operator.names[: operator.names.index(name)])
    part = GaussNewton(model, tokens, [name])
    own = slice(offset, offset + part.parameters)
    close(part.product(v[own]), g[own, own] @ v[own].double())


def test_transposed_weights_and_tied_embeddings():
    model, tokens = small_gpt2(), windows(2, 4)
    operator = GaussNewton(model, tokens, ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"])
    g, _ = dense(model, tokens, operator.names)
    v = vectors(operator.parameters)[0]
    close(operator.product(v), g @ v.double())


def test_a_model_in_half_precision_is_differentiated_in_single(case):
    half = small_llama().bfloat16()
    same = copy.deepcopy(half).float()
    tokens = windows()
    v = vectors(960)[0]
    torch.testing.assert_close(GaussNewton(half, tokens).product(v), GaussNewton(same, tokens).product(v))
    assert half.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16
    assert all(parameter.grad is None for parameter in half.parameters())


def test_a_model_that_draws_and_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match="eval"):
        GaussNewton(small_llama().train(), windows())
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        GaussNewton(small_llama(), windows(), ["nothing"])


@pytest.mark.parametrize("mirrored", [True, False])
def test_the_curvature_of_a_model_is_that_of_the_explicit_matrix(case, mirrored):
    """With few parameters the matrix itself is searched, with many its mirror image."""
    model, tokens, operator, g, _ = case
    names = operator.names if mirrored else operator.names[1:3]
    if not mirrored:
        g, _ = dense(model, tokens, names)
    assert (operator.outputs < len(g)) == mirrored
    found = model_curvature(model, tokens, 3, names=names, spare=7, probes=6)
    values, directions = (part.flip(-1) for part in torch.linalg.eigh(g))
    torch.testing.assert_close(found.values, values[:3], rtol=1e-3, atol=0)
    assert found.converged
    assert found.residuals.max() < 1e-3
    assert abs(found.trace.value - g.trace().item()) < 4 * found.trace.se
    first = model.get_parameter(names[0]).numel()
    share = directions[:first, :3].square().sum(0)
    torch.testing.assert_close(found.shares[names[0]], share, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(sum(found.shares.values()), torch.ones(3).double())
    assert sum(found.even.values()) == pytest.approx(1)


def test_a_search_that_is_cut_short_says_so(case):
    model, tokens, _, g, _ = case
    found = model_curvature(model, tokens, 4, limit=4, spare=1, tolerance=1e-6, probes=2)
    assert not found.converged
    assert 0 < found.at_least <= torch.linalg.eigvalsh(g)[-1].item() * 1.0001

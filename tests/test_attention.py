"""Gradients of attention against torch's own, for every kind of mask and sharing of heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from geoquant.observe import attention
from geoquant.observe.attention import ProductAttention


def case(length: int, heads: int, shared: int, dtype=torch.float64, keys: int | None = None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 8), (2, shared, keys or length, 8), (2, shared, keys or length, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(inputs, weight, **options):
    output = scaled_dot_product_attention(*inputs, **options)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


def window(length: int, additive: bool):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = ((distance >= 0) & (distance < 5))[None, None]
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf) if additive else allowed


@pytest.mark.parametrize(("heads", "shared"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["causal", "free", "boolean", "additive", "longer keys", "scaled"])
@pytest.mark.parametrize("length", [1, 7, 16, 19])
def test_gradients_equal_torch(kind, length, heads, shared, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 8)  # several chunks, the last one shorter
    inputs = case(length, heads, shared, keys=length + 3 if kind == "longer keys" else None)
    options = {
        "causal": {"is_causal": True},
        "free": {},
        "boolean": {"attn_mask": window(length, additive=False)},
        "additive": {"attn_mask": window(length, additive=True)},
        "longer keys": {},
        "scaled": {"is_causal": True, "scale": 0.7},
    }[kind] | {"enable_gqa": heads != shared}
    weight = torch.randn(2, heads, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gradients(inputs, weight, **options)
    with ProductAttention():
        found = gradients(inputs, weight, **options)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_queries_that_see_nothing_have_no_gradient(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    inputs = case(6, 2, 2)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[0] = False  # padding on the left
    with ProductAttention():
        output = scaled_dot_product_attention(*inputs, attn_mask=mask)
        found = torch.autograd.grad(output[:, :, 1:].sum(), inputs)
    assert all(part.isfinite().all() for part in found)
    assert found[0][:, :, 0].abs().max() == 0


def test_bfloat16_stays_within_its_precision():
    inputs = case(200, 4, 2, torch.float32)
    weight = torch.randn(2, 4, 200, 8, generator=torch.Generator().manual_seed(1))
    expected = gradients(inputs, weight, is_causal=True, enable_gqa=True)
    halves = [part.detach().bfloat16().requires_grad_() for part in inputs]
    with ProductAttention():
        found = gradients(halves, weight.bfloat16(), is_causal=True, enable_gqa=True)
    for one, other in zip(found, expected):
        assert (one.float() - other).norm() / other.norm() < 0.02


def test_what_it_does_not_cover_goes_to_torch():
    """Dropout, three dimensions, unaligned causal masks."""
    query, key, value = case(6, 2, 2, torch.float32, keys=9)
    with ProductAttention():
        for options, tensors in [
            ({"is_causal": True}, (query, key, value)),
            ({}, (query[0], key[0], value[0])),
        ]:
            output = scaled_dot_product_attention(*tensors, **options)
            assert "_Attention" not in type(output.grad_fn).__name__
        torch.manual_seed(0)
        dropped = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, scaled_dot_product_attention(query, key, value, dropout_p=0.5))

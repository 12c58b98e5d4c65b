"""Attention with a backward pass made of matrix products.

The fused CPU kernel of `scaled_dot_product_attention` computes its gradient without the matrix units of the
processor; for windows of some hundred tokens that is more than a third of the time of a block's backward pass.
Here the forward pass stays the fused one and keeps nothing but its inputs; the backward pass goes over the queries
in chunks, takes their probabilities anew and forms every gradient as a product. Causal attention skips the keys
that a chunk cannot see.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["ProductAttention"]

QUERIES = 128  # per chunk


class ProductAttention(TorchFunctionMode):
    """Inside this context, attention on a CPU differentiates by matrix products. Dropout is left to torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return function(*args, **kwargs)


def _attend(
    query: Float[Tensor, "b heads l d"],
    key: Float[Tensor, "b shared s d"],
    value: Float[Tensor, "b shared s v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "b heads l v"]:
    """The signature of torch's function."""
    like_flash = query.ndim == 4 and not (is_causal and query.shape[2] != key.shape[2])
    if query.device.type != "cpu" or dropout_p or not like_flash:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, causal, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        shared = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=shared)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, mask = ctx.saved_tensors
        batch, heads, length, width = query.shape
        shared, count = key.shape[1], key.shape[2]
        # Query heads that share a key head are more rows of the same product.
        split = (batch, shared, heads // shared, length)
        queries, gradients = query.reshape(*split, width), gradient.reshape(*split, value.shape[-1])
        keys, values = key.reshape(-1, count, width), value.reshape(-1, count, value.shape[-1])
        if mask is not None:
            mask = mask.expand(batch, heads, length, count).reshape(*split, count)
        key_gradient, value_gradient = torch.zeros_like(keys), torch.zeros_like(values)
        parts = []
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            seen = stop if ctx.causal else count
            rows = queries[:, :, :, start:stop].reshape(len(keys), -1, width) * ctx.scale
            above = gradients[:, :, :, start:stop].reshape(len(keys), -1, values.shape[-1])
            score = rows @ keys[:, :seen].mT
            shaped = score.view(batch, shared, -1, stop - start, seen)
            if ctx.causal:
                future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=score.device).triu(1)
                shaped[..., start:].masked_fill_(future, -torch.inf)
            elif mask is not None:
                part = mask[:, :, :, start:stop]
                shaped.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else shaped.add_(part)
            probability = torch.softmax(score, dim=-1)
            # A query that may see nothing has no probabilities, and no gradient.
            if mask is not None:
                probability = probability.nan_to_num_(0.0)
            value_gradient[:, :seen] += probability.mT @ above
            slope = torch._softmax_backward_data(above @ values[:, :seen].mT, probability, -1, probability.dtype)
            key_gradient[:, :seen] += slope.mT @ rows
            parts.append((slope @ keys[:, :seen]).mul_(ctx.scale).view(batch, shared, -1, stop - start, width))
        query_gradient = torch.cat(parts, dim=3).view(query.shape)
        return query_gradient, key_gradient.view(key.shape), value_gradient.view(value.shape), None, None, None

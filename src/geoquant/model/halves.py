"""Models stored in half precision, at speed on processors that have no units for it.

Without such units torch multiplies bfloat16 and float16 a number at a time: 80 times slower than float32 on a processor
with AVX2 only. Widening both factors first is exact, one pass over the weights, and as much memory as the one matrix
takes; sums are then of float32 in either case, and the product is rounded to the type that it would have had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["multiplies_halves", "widened"]

HALVES = (torch.bfloat16, torch.float16)
# By every name: what a function of this list calls is not seen again.
PRODUCTS = {
    nn.functional.linear,
    nn.functional.scaled_dot_product_attention,
    nn.functional.conv1d,
    nn.functional.conv2d,
    torch.einsum,
    torch.tensordot,
    torch.inner,
    torch.matmul,
    torch.linalg.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.baddbmm,
    Tensor.addmm,
    Tensor.mm,
    # Of experts: the first came with torch 2.10, the second is private.
    getattr(nn.functional, "grouped_mm", torch.matmul),
    getattr(torch, "_grouped_mm", torch.matmul),
}


def multiplies_halves() -> bool:
    """Whether this processor has matrix units for bfloat16 (AMX)."""
    # A private probe of torch, absent in some builds; without it float32 is the safe answer.
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def widened(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, products of halves on a CPU that is slow at them are products of floats. Elsewhere nothing changes."""
    if torch.device(device).type != "cpu" or multiplies_halves() or torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext()
    return _Widened()


class _Widened(TorchFunctionMode):
    """Sees each of torch's functions before it runs."""

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in PRODUCTS:
            return function(*args, **kwargs)
        given = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        half = next((x.dtype for x in given if x.dtype in HALVES), None)
        placed = kwargs.get("out") is not None or kwargs.get("out_dtype") is not None
        if half is None or placed or any(x.dtype.is_floating_point and x.dtype != half for x in given):
            return function(*args, **kwargs)  # types that do not go together are torch's to refuse
        return function(*map(_wide, args), **{name: _wide(x) for name, x in kwargs.items()}).to(half)


def _flat(values: Iterable) -> Iterator:
    """Without the lists (of einsum's operands)."""
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)


def _wide(value: object) -> object:
    if isinstance(value, list | tuple):
        return [*map(_wide, value)]
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value

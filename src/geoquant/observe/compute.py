"""Which number format the forward passes of observation run in.

Weights, residual stream and moments stay in float32; only matrix products may run in bfloat16, and only where
the hardware multiplies it faster (AMX on CPUs, tensor cores on GPUs).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geoquant.model.halves import multiplies_halves

__all__ = [
    "BlockCall",
    "autocast",
    "cast_call",
    "compute_dtype",
    "pure_copy",
    "rounded_products",
    "standing_copy",
    "working_copy",
]


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls a block, besides the hidden states."""

    args: tuple
    kwargs: dict


def compute_dtype(requested: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or for `auto` the faster of both on this device."""
    if requested != "auto":
        return getattr(torch, requested)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = multiplies_halves()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype`, everything else as stored."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@contextlib.contextmanager
def rounded_products(wanted: bool = True) -> Iterator[None]:
    """Products of float32 matrices round what they multiply (to bfloat16 on CPUs that multiply it faster, to TF32 on
    GPUs) and add in float32. For sums over many tokens: the Gram matrix of rounded tokens is still a Gram matrix.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def working_copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block with its weight matrices in the compute dtype: one block's working set, dropped after use.

    Vectors (norm gains, biases) stay in float32 beside the float32 residual stream. Converting once per block
    beats autocast's conversion at every call.
    """
    return _converted(block, lambda parameter: dtype if parameter.ndim >= 2 else torch.float32)


def pure_copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The whole block in the compute dtype, norms too: where a per cent of error does not matter (gradients)."""
    return _converted(block, lambda parameter: dtype)


def standing_copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A working copy that keeps its weights when those of the block are replaced."""
    work = working_copy(block, dtype)
    # New parameters on the same memory: a replaced weight is new memory.
    own = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in work.parameters()}
    return copy.deepcopy(work, own)


def _converted(block: nn.Module, wanted: Callable[[nn.Parameter], torch.dtype]) -> nn.Module:
    """A copy with converted parameters that shares those that need no conversion; the block itself if none does."""
    converted = {
        id(parameter): nn.Parameter(parameter.detach().to(wanted(parameter)), requires_grad=False)
        for parameter in block.parameters()
        if parameter.dtype != wanted(parameter)
    }
    if not converted:
        return block
    # What the memo holds already, deepcopy takes as copied: no parameter is duplicated on the way.
    shared = {id(parameter): parameter for parameter in block.parameters()}
    return copy.deepcopy(block, shared | converted)


def cast_call(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """The block's arguments with every floating tensor (rotary tables, additive masks) in `dtype`."""

    def cast(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, tuple):
            return tuple(cast(item) for item in value)
        return value

    return BlockCall(cast(call.args), {name: cast(value) for name, value in call.kwargs.items()})

"""Run a model block by block: hidden states in, hidden states out, one block's working set at a time.

A block is called with the very arguments that the model itself passes (attention mask, rotary embeddings...),
captured once per block from a real forward pass, so any architecture streams without code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.model.halves import widened
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import find_blocks
from geoquant.observe.compute import BlockCall, autocast

__all__ = ["BlockCall", "Stop", "Stream", "hooks", "open_stream", "run_block", "spread"]


class Stop(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


@dataclass(frozen=True)
class Stream:
    """Hidden states that enter the next block, one tensor (batch, length, hidden) per batch, and the calls."""

    batches: list[Float[Tensor, "batch length hidden"]]
    calls: tuple[BlockCall, ...]


def batch_size(windows: int, limit: int = 2) -> int:
    """The largest divisor of `windows` up to `limit`: the captured arguments fit one batch size only."""
    return max(size for size in range(1, min(limit, windows) + 1) if windows % size == 0)


def spread(count: int, share: float) -> list[int]:
    """A `share` of 0..count-1, at least one: evenly spread and ending with the last, which is held out later."""
    wanted = min(count, max(1, round(share * count)))
    return [(index + 1) * count // wanted - 1 for index in range(wanted)]


@contextmanager
def hooks(handles: Sequence) -> Iterator[None]:
    """Remove hook handles at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def open_stream(
    model: nn.Module,
    tokens: Int[Tensor, "n length"],
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    size: int | None = None,
) -> Stream:
    """Embed all windows and capture each block's call (one real forward pass of the first batch).

    size: of a batch, a divisor of their number; by default two, or one of an odd number.
    """
    _, blocks = find_blocks(model)
    device = next(model.parameters()).device
    size = size or batch_size(len(tokens))
    calls: list[BlockCall] = []
    batches: list[Tensor] = []

    def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(args[1:], rest))

    def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
        batches.append((args[0] if args else kwargs["hidden_states"]).float())
        raise Stop

    handles = [block.register_forward_pre_hook(capture, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(lambda used, *_: pages.release(used.parameters())) for block in blocks]
    with hooks(handles), autocast(device, compute), widened(device):
        model.base_model(tokens[:size].to(device), use_cache=False)
    with hooks([blocks[0].register_forward_pre_hook(first, with_kwargs=True)]):
        for start in range(0, len(tokens), size):
            try:
                model.base_model(tokens[start : start + size].to(device), use_cache=False)
            except Stop:
                continue
    return Stream(batches, tuple(calls))


def run_block(block: nn.Module, call: BlockCall, hidden: Float[Tensor, "b l h"]) -> Float[Tensor, "b l h"]:
    """One block on one batch."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output

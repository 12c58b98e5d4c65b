"""One pass back through a model with several texts at once: every site's inputs and output gradients, block by block.

Forward first, keeping what enters each block; then from the last block to the first, where each is run once more with
gradients. What a site sees is handed on at once and kept by nobody, so memory holds the block inputs of all texts (half
precision) and the working set of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, find_blocks
from geoquant.observe.attention import ProductAttention
from geoquant.observe.compute import BlockCall, cast_call, pure_copy
from geoquant.observe.gradient import head_gradient
from geoquant.observe.stream import hooks, open_stream, run_block
from geoquant.observe.texts import Sequences
from geoquant.progress import Progress, silent

__all__ = ["Seen", "backward"]

# Seen(text, batch, site, inputs, gradients): real tokens only, in float32; of sites that read the same, one tensor.
Seen = Callable[[str, int, str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]


@dataclass
class _Text:
    """One text on its way through: what enters each block, the calls, and the gradient that has come back so far."""

    calls: list[BlockCall]
    inputs: list[list[Tensor]]
    gradients: list[Tensor]
    real: list[Tensor]  # by batch, which of its (flattened) tokens are real


def backward(
    model: nn.Module,
    blocks: tuple[Block, ...],
    texts: dict[str, Sequences],
    see: Seen,
    *,
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> Iterator[Block]:
    """Yields each block, the last one first, once `see` has had all its sites, texts and batches (texts in their
    order, batches in the order of the sequences).

    Gradients are those of the loss in nats summed over the real tokens of a text. Raises UserError where one is not
    finite, or where a site does not see every token (experts behind a router).
    """
    under_way = {name: _forward(model, text, compute, pages) for name, text in texts.items()}
    _, modules = find_blocks(model)
    for number, (block, module) in enumerate(zip(reversed(blocks), reversed(list(modules)), strict=True), 1):
        work = pure_copy(module, compute)
        for name, text in under_way.items():
            call = text.calls[block.index]
            for index, (hidden, gradient) in enumerate(zip(text.inputs.pop(), text.gradients, strict=True)):
                text.gradients[index] = _through(
                    work, block, call, hidden.to(compute), gradient, text.real[index], partial(see, name, index)
                )
        pages.release(module.parameters())
        progress("gradients", number, len(blocks), block.name)
        yield block


@torch.no_grad()
def _forward(model: nn.Module, text: Sequences, compute: torch.dtype, pages: Pages) -> _Text:
    """Every block's inputs, and the gradient at the last block's output."""
    stream = open_stream(model, text.tokens, compute, pages, text.batch)
    _, modules = find_blocks(model)
    calls = [cast_call(call, compute) for call in stream.calls]
    size = len(stream.batches[0])
    hidden = [batch.to(compute) for batch in stream.batches]
    inputs = []
    for module, call in zip(modules, calls, strict=True):
        inputs.append([batch.to(torch.bfloat16) for batch in hidden])
        work = pure_copy(module, compute)
        hidden = [run_block(work, call, batch) for batch in hidden]
        pages.release(module.parameters())
    head = model.get_output_embeddings().weight.to(compute)
    tokens, lengths = text.tokens.to(hidden[0].device), text.lengths.to(hidden[0].device)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    gradients, real = [], []
    for index, batch in enumerate(hidden):
        rows = slice(index * size, (index + 1) * size)
        gradient = head_gradient(model, batch, tokens[rows], head)
        # The last real token predicts a filler: that is no loss.
        gradient *= (places < lengths[rows, None] - 1)[..., None]
        gradients.append(gradient)
        real.append((places < lengths[rows, None]).flatten())
    return _Text(calls, inputs, gradients, real)


@torch.enable_grad()
def _through(
    work: nn.Module,
    block: Block,
    call: BlockCall,
    hidden: Float[Tensor, "b l h"],
    gradient: Float[Tensor, "b l h"],
    real: Tensor,
    see: Callable[[str, Tensor, Tensor], None],
) -> Float[Tensor, "b l h"]:
    """Back through one block on one batch."""
    inside = {f"{block.name}.{name}": part for name, part in work.named_modules()}
    kept: dict[str, Tensor] = {}
    last: list[Tensor] = []  # what was read, and what was made of it: often several sites in a row read the same

    def observe(site: str):
        def forward(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not last or last[0] is not inputs[0]:
                flat = inputs[0].detach().flatten(0, -2)
                last[:] = inputs[0], flat[real].float() if len(flat) == len(real) else flat
            kept[site] = last[1]

            def back(g: Tensor) -> None:
                x, flat = kept.pop(site), g.detach().flatten(0, -2)
                if len(flat) != len(real):
                    raise UserError(
                        f"site {site} sees {len(flat)} of {len(real)} tokens", wanted="a site that sees every token"
                    )
                flat = flat[real].float()
                if not flat.isfinite().all():
                    raise UserError(
                        f"the loss gradient at {site} is not finite", fix="from Python, use compute='float32'"
                    )
                see(site, x, flat)

            output.register_hook(back)

        return forward

    leaf = hidden.detach().requires_grad_()
    handles = [inside[site.name].register_forward_hook(observe(site.name)) for site in block.sites]
    with hooks(handles), ProductAttention():
        output = run_block(work, call, leaf)
        return torch.autograd.grad(output, leaf, gradient)[0]

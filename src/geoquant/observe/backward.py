"""One pass back through a model with several texts at once: every site's inputs and output gradients, block by block.

Forward first, keeping what enters each block; then from the last block to the first, where each is run once more with
gradients. What a site sees is handed on at once and kept by nobody, so memory holds the block inputs of all texts (half
precision) and the working set of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from geoquant.observe.experts import Expert, Routes, eager_experts
from geoquant.observe.gradient import head_gradient
from geoquant.observe.stream import hooks, open_stream, run_block
from geoquant.observe.texts import Sequences
from geoquant.progress import Progress, silent

__all__ = ["Losses", "Seen", "backward", "through_block"]

KEPT = torch.bfloat16  # what enters each block, of all texts

# Seen(text, batch, site, inputs, gradients): real tokens only, in float32; of sites that read the same, one tensor.
Seen = Callable[[str, int, str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]

# Losses(outputs): from what leaves the last block, of every text by batch, to the gradients there; None ends the pass.
Losses = Callable[[dict[str, list[Tensor]]], dict[str, list[Tensor]] | None]


@dataclass
class _Text:
    """One text on its way through: what enters each block, the calls, and the gradient that has come back so far."""

    calls: list[BlockCall]
    inputs: list[list[Tensor]]
    outputs: list[Tensor]  # of the last block, until its gradients are known
    gradients: list[Tensor]
    real: list[Tensor]  # by batch, which of its (flattened) tokens are real


def backward(
    model: nn.Module,
    blocks: tuple[Block, ...],
    texts: dict[str, Sequences],
    see: Seen,
    *,
    experts: Mapping[int, Sequence[Expert]] | None = None,
    losses: Losses | None = None,
    entered: Callable[[str, list[Tensor]], None] | None = None,
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> Iterator[Block]:
    """Yields each block, the last one first, once `see` has had all its sites, texts and batches (texts in their
    order, batches in the order of the sequences).

    experts: of each block, stacked experts that are watched as sites too. An expert sees the tokens that the router
    sends there, and `see` is not called where these are none. What enters a block is kept in half precision, so that a
    token near a tie may be sent elsewhere than in the model itself.

    Gradients are those of the loss in nats summed over the real tokens of a text. Raises UserError where one is not
    finite, or where nobody can say which tokens a site sees.
    """
    with eager_experts(model) if experts else nullcontext():
        yield from _backward(model, blocks, texts, see, experts or {}, losses, entered, compute, pages, progress)


def _backward(
    model: nn.Module,
    blocks: tuple[Block, ...],
    texts: dict[str, Sequences],
    see: Seen,
    experts: Mapping[int, Sequence[Expert]],
    losses: Losses | None,
    entered: Callable[[str, list[Tensor]], None] | None,
    compute: torch.dtype,
    pages: Pages,
    progress: Progress,
) -> Iterator[Block]:
    under_way: dict[str, _Text] = {}
    for name, text in texts.items():
        under_way[name] = _forward(model, text, compute, pages)
        if losses is None:
            _next_token(model, text, under_way[name], compute)
    if losses is not None:
        if (found := losses({name: text.outputs for name, text in under_way.items()})) is None:
            return
        for name, text in under_way.items():
            text.outputs, text.gradients = [], found[name]
    _, modules = find_blocks(model)
    for number, (block, module) in enumerate(zip(reversed(blocks), reversed(list(modules)), strict=True), 1):
        work = pure_copy(module, compute)
        own = experts.get(block.index, ())
        for name, text in under_way.items():
            call = text.calls[block.index]
            for index, (hidden, gradient) in enumerate(zip(text.inputs.pop(), text.gradients, strict=True)):
                seen = partial(see, name, index)
                text.gradients[index] = through_block(
                    work, block, own, call, hidden.to(compute), gradient, text.real[index], seen
                )
        pages.release(module.parameters())
        progress("gradients", number, len(blocks), block.name)
        yield block
    for name, text in under_way.items():
        if entered is not None:
            entered(name, text.gradients)


@torch.no_grad()
def _forward(model: nn.Module, text: Sequences, compute: torch.dtype, pages: Pages) -> _Text:
    """Every block's inputs, and the last one's output."""
    stream = open_stream(model, text.tokens, compute, pages, text.batch)
    _, modules = find_blocks(model)
    calls = [cast_call(call, compute) for call in stream.calls]
    size = len(stream.batches[0])
    hidden = [batch.to(compute) for batch in stream.batches]
    inputs = []
    for module, call in zip(modules, calls, strict=True):
        inputs.append([batch.to(KEPT) for batch in hidden])
        work = pure_copy(module, compute)
        hidden = [run_block(work, call, batch) for batch in hidden]
        pages.release(module.parameters())
    places = torch.arange(text.tokens.shape[1], device=hidden[0].device)
    lengths = text.lengths.to(hidden[0].device).split(size)
    real = [(places < own[:, None]).flatten() for own in lengths]
    return _Text(calls, inputs, hidden, [], real)


@torch.no_grad()
def _next_token(model: nn.Module, text: Sequences, passing: _Text, compute: torch.dtype) -> None:
    """The gradient of the next-token loss at the last block's output."""
    head = model.get_output_embeddings().weight.to(compute)
    size, device = len(passing.outputs[0]), passing.outputs[0].device
    tokens, lengths = text.tokens.to(device).split(size), text.lengths.to(device).split(size)
    places = torch.arange(text.tokens.shape[1], device=device)
    for own, count, output in zip(tokens, lengths, passing.outputs, strict=True):
        gradient = head_gradient(model, output, own, head)
        # The last real token predicts a filler: that is no loss.
        gradient *= (places < count[:, None] - 1)[..., None]
        passing.gradients.append(gradient)
    passing.outputs = []


@torch.enable_grad()
def through_block(
    work: nn.Module,
    block: Block,
    experts: Sequence[Expert],
    call: BlockCall,
    hidden: Float[Tensor, "b l h"],
    gradient: Float[Tensor, "b l h"],
    real: Tensor,
    see: Callable[[str, Tensor, Tensor], None],
) -> Float[Tensor, "b l h"]:
    """Back through one block on one batch: `gradient` at its output becomes the one at its input. `see` is given a
    site, its inputs and its output gradients."""
    inside = {f"{block.name}.{name}": part for name, part in work.named_modules()}
    names = {(expert.stack, expert.index): expert.site.name for expert in experts}
    stacks = {stack: work.get_parameter(stack.removeprefix(f"{block.name}.")) for stack, _ in names}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    last: list[Tensor] = []  # what was read, and its real tokens: often several sites in a row read the same

    def keep(site: str, x: Tensor, rows: Tensor, output: Tensor) -> None:
        true = real[rows]
        if not last or last[0] is not x:
            last[:] = x, x.detach().flatten(0, -2)[true].float()
        kept[site] = last[1], true

        def back(g: Tensor) -> None:
            x, true = kept.pop(site)
            flat = g.detach().flatten(0, -2)[true].float()
            if not flat.isfinite().all():
                raise UserError(f"the loss gradient at {site} is not finite", fix="from Python, use compute='float32'")
            if len(flat):
                see(site, x, flat)

        output.register_hook(back)

    def observe(site: str):
        def forward(_: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            rows = routes.rows(x, site.rpartition(".")[0])
            if rows is None:
                raise UserError(
                    f"site {site} sees {x.numel() // x.shape[-1]} of {len(real)} tokens, and which is not known",
                    wanted="a site that sees every token, or tokens taken by their index",
                )
            if len(rows):
                keep(site, x, rows, output)

        return forward

    def product(stack: str, index: int, x: Tensor, rows: Tensor, output: Tensor, _: bool) -> None:
        keep(names[stack, index], x, rows, output)

    routes = Routes(len(real), stacks, product)
    leaf = hidden.detach().requires_grad_()
    handles = [inside[site.name].register_forward_hook(observe(site.name), with_kwargs=True) for site in block.sites]
    with hooks(handles), ProductAttention():
        with routes:  # not around the way back, whose own indexing it would keep
            output = run_block(work, call, leaf)
        return torch.autograd.grad(output, leaf, gradient)[0]

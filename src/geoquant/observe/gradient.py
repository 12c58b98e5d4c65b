"""Gradient energy per token: `||g_t||^2`, with g_t the loss gradient at a site's output, summed over the sites
that share an input.

Only this one number per token and stage is kept (a few megabytes for a whole model), so the backward pass runs
once on the full-precision model and the moments can be accumulated later on whatever inputs the quantized blocks
produce. A share of the windows may do: it costs less, and tokens without a gradient (NaN) are weighted by their size
instead (`clipped`, see moments). Windows go through in chunks; blocks are recomputed in the backward pass, so memory
holds the block inputs of one chunk and the activations of one block on one batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, find_blocks
from geoquant.observe.attention import ProductAttention
from geoquant.observe.compute import cast_call, pure_copy
from geoquant.observe.stream import BlockCall, Stream, hooks, run_block
from geoquant.progress import Progress, silent

__all__ = ["check_head", "token_energies"]

CHUNK = 4  # windows per chunk
HEAD_ROWS = 128


def token_energies(
    model: nn.Module,
    blocks: tuple[Block, ...],
    stream: Stream,
    tokens: Int[Tensor, "n length"],
    *,
    compute: torch.dtype,
    share: float = 1.0,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> dict[str, Float[Tensor, "n length"]]:
    """Per stage, `||g_t||^2` of every token, scaled to mean one.

    share: of the batches, evenly spread, the last one among them; the other tokens are NaN.
    """
    _, modules = find_blocks(model)
    size = len(stream.batches[0])
    calls = [cast_call(call, compute) for call in stream.calls]
    energies = {stage.name: torch.full(tokens.shape, torch.nan) for block in blocks for stage in block.stages}
    chosen = spread(len(stream.batches), share)
    per_chunk = max(1, CHUNK // size)
    steps = -(-len(chosen) // per_chunk) * len(blocks)
    done = 0
    head = model.get_output_embeddings().weight.to(compute)
    pages.release(model.parameters())
    for first in range(0, len(chosen), per_chunk):
        rows = [slice(index * size, (index + 1) * size) for index in chosen[first : first + per_chunk]]
        hidden = [stream.batches[index].to(compute) for index in chosen[first : first + per_chunk]]
        inputs: list[list[Tensor]] = []
        for module, call in zip(modules, calls):
            inputs.append(hidden)
            work = pure_copy(module, compute)
            with torch.no_grad():
                hidden = [run_block(work, call, x) for x in hidden]
            pages.release(module.parameters())
        gradients = [_head_gradient(model, x, tokens[part].to(x.device), head) for part, x in zip(rows, hidden)]
        for block, module, call in zip(reversed(blocks), reversed(list(modules)), reversed(calls)):
            work = pure_copy(module, compute)
            inside = {f"{block.name}.{name}": part for name, part in work.named_modules()}
            for index, (x, gradient) in enumerate(zip(inputs.pop(), gradients)):
                gradients[index] = _block_gradient(work, inside, block, call, x, gradient, energies, rows[index])
            pages.release(module.parameters())
            done += 1
            progress("gradients", done, steps, block.name)
    rows = [row for index in chosen for row in range(index * size, (index + 1) * size)]
    for name, energy in energies.items():
        if not energy[rows].isfinite().all():
            raise UserError(
                f"the loss gradient at {name} is not finite", fix="use --compute float32, or --metric clipped"
            )
    return {name: energy / energy.nanmean().clamp_min(1e-30) for name, energy in energies.items()}


def spread(count: int, share: float) -> list[int]:
    """A `share` of 0..count-1, at least one: evenly spread and ending with the last, which is held out later."""
    wanted = min(count, max(1, round(share * count)))
    return [(index + 1) * count // wanted - 1 for index in range(wanted)]


@torch.no_grad()
def _head_gradient(
    model: nn.Module,
    hidden: Float[Tensor, "b l h"],
    tokens: Int[Tensor, "b l"],
    head: Float[Tensor, "vocab h"],
) -> Float[Tensor, "b l h"]:
    """Gradient of the summed next-token loss at the last block's output, a few positions at a time.

    `softmax - onehot` is written in place of the logits: autograd would hold three copies of them.
    """
    norm, cap, scale = _final_norm(model), getattr(model.config, "final_logit_softcapping", None), _logit_scale(model)
    bias = model.get_output_embeddings().bias
    result = torch.zeros_like(hidden)
    flat, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    parts = []
    for h, t in zip(flat.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            normed = norm(leaf)
        logits = normed.detach().to(head.dtype) @ head.T
        if bias is not None:
            logits += bias
        logits *= scale
        slope = None
        if cap:
            logits = torch.tanh(logits / cap)
            slope = 1 - logits.square()
            logits *= cap
        gradient = torch.softmax(logits, dim=-1)
        gradient[torch.arange(len(t), device=t.device), t] -= 1.0
        if slope is not None:
            gradient *= slope
        gradient *= scale
        parts.append(torch.autograd.grad(normed, leaf, (gradient @ head).to(normed.dtype))[0].to(hidden.dtype))
    result[:, :-1] = torch.cat(parts).view(hidden.shape[0], -1, hidden.shape[2])
    return result


@torch.no_grad()
def check_head(model: nn.Module, probe: Int[Tensor, "n length"], pages: Pages = UNMAPPED) -> None:
    """Whether the way from the last block to the logits is the one that `token_energies` differentiates.

    Raises UserError where the model puts something else in between (a projection, a scale of another name).
    """
    _, modules = find_blocks(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(lambda used, *_: pages.release(used.parameters())) for module in modules]
    with hooks([*handles, modules[-1].register_forward_hook(keep)]):
        expected = model(probe.to(model.device), use_cache=False).logits.float()
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    try:
        found = head(_final_norm(model)(seen[0])).float() * _logit_scale(model)
    except RuntimeError:  # shapes that do not fit
        found = torch.full_like(expected, torch.nan)
    found = cap * torch.tanh(found / cap) if cap else found
    if not (found - expected).norm() <= 0.02 * expected.norm():
        raise UserError(
            f"{type(model).__name__} computes its logits in a way the gradient metric does not know",
            fix="use --metric clipped",
        )


def _logit_scale(model: nn.Module) -> float:
    """What the model multiplies its logits with (Cohere), or the inverse of what it divides them by (Granite)."""
    config = model.config
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def _final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last block and the vocabulary projection: the norm next to the block list."""
    name, _ = find_blocks(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    found = [child for label, child in parent.named_children() if "norm" in label.lower() or label == "ln_f"]
    return found[-1] if found else nn.Identity()


@torch.enable_grad()
def _block_gradient(
    work: nn.Module,
    inside: dict[str, nn.Module],
    block: Block,
    call: BlockCall,
    x: Float[Tensor, "b l h"],
    gradient: Float[Tensor, "b l h"],
    energies: dict[str, Float[Tensor, "n length"]],
    rows: slice,
) -> Float[Tensor, "b l h"]:
    """Back through one block on one batch; adds the energies of its sites' output gradients."""

    def watch(stage: str):
        def forward(_: nn.Module, __: tuple, output: Tensor) -> None:
            def backward(g: Tensor) -> None:
                energy = g.detach().square().sum(-1, dtype=torch.float32).cpu()
                if energy.numel() != x.shape[0] * x.shape[1]:
                    raise UserError(
                        f"site {stage} sees {energy.numel()} of {x.shape[0] * x.shape[1]} tokens",
                        wanted="a site that sees every token",
                        fix="use --metric plain",
                    )
                # Some modules flatten their tokens (shared experts).
                energies[stage][rows] += energy.view(x.shape[:2])

            output.register_hook(backward)

        return forward

    for stage in block.stages:
        energies[stage.name][rows] = 0.0
    handles = [
        inside[site.name].register_forward_hook(watch(stage.name)) for stage in block.stages for site in stage.sites
    ]
    leaf = x.detach().requires_grad_()
    with hooks(handles), ProductAttention():
        output = run_block(work, call, leaf)
        return torch.autograd.grad(output, leaf, gradient)[0]

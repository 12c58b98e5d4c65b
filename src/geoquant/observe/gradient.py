"""Gradient energy per token: `||g_t||^2`, with g_t the loss gradient at a site's output, summed over the sites
that share an input.

Only this one number per token and stage is kept (a few megabytes for a whole model), so the backward pass runs
once on the full-precision model and the moments can be accumulated later on whatever inputs the quantized blocks
produce. A share of the windows may do: it costs less, and tokens without a gradient (NaN) are weighted by their size
instead (`clipped`, see moments). Windows go through in chunks; blocks are recomputed in the backward pass, so memory
holds the block inputs of one chunk and the activations of one block on one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.halves import widened
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, Stage, find_blocks
from geoquant.observe.attention import ProductAttention
from geoquant.observe.compute import cast_call, pure_copy
from geoquant.observe.moments import Accumulator
from geoquant.observe.stream import BlockCall, Stream, hooks, run_block, spread
from geoquant.observe.vocabulary import VocabularyMoments, VocabularyWatch
from geoquant.progress import Progress, silent

__all__ = ["Curvature", "check_head", "final_norm", "head_gradient", "token_energies"]

CHUNK = 4  # windows per chunk
HEAD_ROWS = 128


@dataclass(frozen=True)
class Curvature:
    """What the backward pass leaves, by stage.

    tokens: (n, length) `||g_t||^2` of every token, scaled to mean one; NaN where a token has no gradient.
    rows:   (blocks, size, size) mean over tokens of `g g^T` for blocks of neighbouring outputs of each of the stacked
            sites (zero beyond a site's last row), in nats^2 per squared unit of the output.
    vocabulary: what embedding and head need, if they were asked for.
    """

    tokens: dict[str, Float[Tensor, "n length"]]
    rows: dict[str, Float[Tensor, "blocks size size"]]
    vocabulary: VocabularyMoments | None = None


@dataclass
class _Watch:
    """The sums of one chunk of windows; `metrics` only where somebody asked for them."""

    energies: dict[str, Float[Tensor, "n length"]]
    rows: dict[str, Float[Tensor, "blocks size size"]]
    metrics: dict[str, Accumulator] | None = None
    inputs: dict[str, Float[Tensor, "b l in"]] = field(default_factory=dict)


def token_energies(
    model: nn.Module,
    blocks: tuple[Block, ...],
    stream: Stream,
    tokens: Int[Tensor, "n length"],
    *,
    compute: torch.dtype,
    share: float = 1.0,
    chunk: int = CHUNK,
    row_block: int = 1,
    vocabulary: bool = False,
    seen: Callable[[Stage, Float[Tensor, "blocks size size"], Float[Tensor, "in in"]], None] | None = None,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> Curvature:
    """Token weights and output curvature of every stage.

    share: of the batches, evenly spread, the last one among them; the other tokens have no gradient.
    chunk: windows that go through together. row_block: how many neighbouring outputs share a block of `Curvature.rows`.
    vocabulary: observe embedding and head as well; the last batch is held out where there are several.
    seen:  gets of each stage, last block first, what the first chunk says: the curvature of its rows (see Curvature)
           and the moments `sum_t ||g_t||^2 x_t x_t^T / sum_t ||g_t||^2`.
    """
    _, modules = find_blocks(model)
    size = len(stream.batches[0])
    calls = [cast_call(call, compute) for call in stream.calls]
    stages = [stage for block in blocks for stage in block.stages]
    device = stream.batches[0].device
    energies = {stage.name: torch.full(tokens.shape, torch.nan) for stage in stages}
    counts = {stage.name: sum(-(-site.shape[0] // row_block) for site in stage.sites) for stage in stages}
    watch = _Watch(
        energies, {name: torch.zeros(count, row_block, row_block, device=device) for name, count in counts.items()}
    )
    chosen = spread(len(stream.batches), share)
    ends = VocabularyWatch(model, tokens) if vocabulary else None
    per_chunk = max(1, chunk // size)
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
        held = [len(chosen) > 2 and index == chosen[-1] for index in chosen[first : first + per_chunk]]
        gradients = []
        for part, x, last in zip(rows, hidden, held):
            see = ends and partial(ends.see_head, held=last)
            gradients.append(head_gradient(model, x, tokens[part].to(x.device), head, see))
        for block, module, call in zip(reversed(blocks), reversed(list(modules)), reversed(calls)):
            work = pure_copy(module, compute)
            inside = {f"{block.name}.{name}": part for name, part in work.named_modules()}
            wanted = seen is not None and first == 0
            watch.metrics = (
                {stage.name: _accumulator(stage, device, compute) for stage in block.stages} if wanted else None
            )
            for index, (x, gradient) in enumerate(zip(inputs.pop(), gradients)):
                gradients[index] = _block_gradient(work, inside, block, call, x, gradient, watch, rows[index])
            for stage in block.stages:
                _check_finite(stage.name, torch.cat([energies[stage.name][part] for part in rows]))
            for stage in block.stages if wanted else ():
                moments, weight = watch.metrics.pop(stage.name).finish(), energies[stage.name].nansum()
                count = len(rows) * size * tokens.shape[1]
                seen(stage, watch.rows[stage.name] / count, moments.hessian.div_(weight.clamp_min(1e-30)))
            pages.release(module.parameters())
            done += 1
            progress("gradients", done, steps, block.name)
        for part, gradient, last in zip(rows, gradients, held):
            if ends:
                ends.see_embedding(tokens[part], gradient, held=last)
    rows = [row for index in chosen for row in range(index * size, (index + 1) * size)]
    for name, energy in energies.items():
        _check_finite(name, energy[rows])
    counted = len(rows) * tokens.shape[1]
    return Curvature(
        tokens={name: energy / energy.nanmean().clamp_min(1e-30) for name, energy in energies.items()},
        rows={name: total.cpu() / counted for name, total in watch.rows.items()},
        vocabulary=ends and ends.finish(),
    )


def _check_finite(name: str, energies: Tensor) -> None:
    if not energies.isfinite().all():
        raise UserError(f"the loss gradient at {name} is not finite", fix="use --compute float32, or --metric clipped")


def _add_blocks(total: Float[Tensor, "blocks size size"], g: Float[Tensor, "tokens out"]) -> None:
    """Add `sum_t g g^T` of neighbouring outputs to the blocks of one site, in place."""
    blocks, size, _ = total.shape
    if size == 1:
        total[:, 0, 0] += g.square().sum(0)
        return
    padded = nn.functional.pad(g, (0, blocks * size - g.shape[1])).view(-1, blocks, size).transpose(0, 1)
    total.baddbmm_(padded.transpose(1, 2), padded)


def _accumulator(stage: Stage, device: torch.device, compute: torch.dtype) -> Accumulator:
    return Accumulator(stage.columns, dtype=torch.float32, device=device, compute=compute)


@torch.no_grad()
def head_gradient(
    model: nn.Module,
    hidden: Float[Tensor, "b l h"],
    tokens: Int[Tensor, "b l"],
    head: Float[Tensor, "vocab h"],
    see: Callable[[Tensor, Tensor, Tensor | float], None] | None = None,
) -> Float[Tensor, "b l h"]:
    """Gradient of the summed next-token loss at the last block's output, a few positions at a time.

    `softmax - onehot` is written in place of the logits: autograd would hold three copies of them.
    """
    norm, cap, scale = final_norm(model), getattr(model.config, "final_logit_softcapping", None), _logit_scale(model)
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
        if see is not None:
            see(normed, gradient, scale if slope is None else scale * slope)
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
    with hooks([*handles, modules[-1].register_forward_hook(keep)]), widened(model.device):
        expected = model(probe.to(model.device), use_cache=False).logits.float()
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    try:
        found = head(final_norm(model)(seen[0])).float() * _logit_scale(model)
    except RuntimeError:  # shapes that do not fit
        found = torch.full_like(expected, torch.nan)
    found = cap * torch.tanh(found / cap) if cap else found
    if not (found - expected).norm() <= 0.02 * expected.norm():
        raise UserError(
            f"{type(model).__name__} computes its logits in a way the gradient metric does not know",
            fix="use --grid box --metric clipped",
        )


def _logit_scale(model: nn.Module) -> float:
    """What the model multiplies its logits with (Cohere), or the inverse of what it divides them by (Granite)."""
    config = model.config
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def final_norm(model: nn.Module) -> nn.Module:
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
    watch: _Watch,
    rows: slice,
) -> Float[Tensor, "b l h"]:
    """Back through one block on one batch; adds what its sites' output gradients tell."""

    def observe(stage: Stage, part: slice):
        def forward(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if watch.metrics is not None:
                watch.inputs[stage.name] = inputs[0].detach()

            def backward(g: Tensor) -> None:
                flat = g.detach().float().flatten(0, -2)
                if len(flat) != x.shape[0] * x.shape[1]:
                    raise UserError(
                        f"site {stage.name} sees {len(flat)} of {x.shape[0] * x.shape[1]} tokens",
                        wanted="a site that sees every token",
                        fix="use --metric plain",
                    )
                # Some modules flatten their tokens (shared experts).
                watch.energies[stage.name][rows] += flat.square().sum(1).view(x.shape[:2]).cpu()
                _add_blocks(watch.rows[stage.name][part], flat)

            output.register_hook(backward)

        return forward

    handles = []
    for stage in block.stages:
        watch.energies[stage.name][rows] = 0.0
        start = 0
        for site in stage.sites:
            part = slice(start, start - (-site.shape[0] // watch.rows[stage.name].shape[1]))
            handles.append(inside[site.name].register_forward_hook(observe(stage, part)))
            start = part.stop
    leaf = x.detach().requires_grad_()
    with hooks(handles), ProductAttention():
        output = run_block(work, call, leaf)
        result = torch.autograd.grad(output, leaf, gradient)[0]
    for stage in block.stages if watch.metrics is not None else ():
        inputs = watch.inputs.pop(stage.name).flatten(0, -2).float()
        weights = watch.energies[stage.name][rows].flatten().to(inputs.device)
        watch.metrics[stage.name].add(inputs, weights, held=False)
    return result

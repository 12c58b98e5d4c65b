"""Refinement block by block: each block's own codes learn to lower the error of its output, the first block first.

Two streams of hidden states pass through the texts, one through the full-precision model and one through the refined
blocks so far. Of block b, with output y on the one and q on the other,

    E_b = sum_t |q_t - y_t|^2 / sum_t |y_t|^2          over all real tokens of public text and of the domain, all alike

falls by a few passes of learned rounding (latent.py) in a trust region (reach.py): no code goes further than one step
from the solver's. What earlier blocks did wrong is in q already, so a block also makes up for them as far as a step
allows. In memory are the hidden states, one block's gradients, and the latents of all blocks (two bytes a weight).

A code that moves goes a whole step. It wins what the slope says and loses half the curvature of that step,

    g s  against  h s^2 / 2,      h_ij = 2 sum_t (J_t^T J_t)_ii x_tj^2 / sum_t |y_t|^2

and where a solver has been, most codes lose: down the plain slope the error rises however short the update is. So the
slope is shrunk by that loss, g to sign(g) (|g| - h |s| / 2)_+, and only codes that win by themselves are pushed. J is
the block's derivative from the site's output to its own; the diagonal of its square comes of one way back with random
signs in the error's place (Hutchinson 1990). Each token counts by itself; but what attention reads of many tokens adds
up in one output, so there the tokens of a batch are squared together, and the few batches' squares are smoothed to the
product of their sums over rows and columns.

Block-wise learned rounding: Li et al. (BRECQ, 2021, arXiv:2102.05426). A lower error of a block is not yet a lower
divergence of the model: whether the passes end to end start from here is judged by their own objective (run.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.vocabulary import repeated
from geoquant.model.walk import Block, Stage, find_blocks
from geoquant.observe.backward import through_block
from geoquant.observe.compute import BlockCall, autocast, cast_call, pure_copy, working_copy
from geoquant.observe.reference import Reference
from geoquant.observe.replay import Replay
from geoquant.observe.stream import open_stream
from geoquant.observe.texts import Sequences
from geoquant.privacy.refine.descent import Descent, place, stacked
from geoquant.privacy.refine.latent import begun, slope_squared, step_sizes
from geoquant.privacy.refine.material import TAUGHT
from geoquant.privacy.refine.reach import Reach
from geoquant.privacy.refine.state import BlockState
from geoquant.progress import Progress, silent

__all__ = ["BlockError", "refine_blocks"]

GAIN = 0.25  # share of its error that a block's first update would win if it were linear


@dataclass(frozen=True)
class BlockError:
    """A block's output error. total: as a share of the output's energy, all tokens together. token: mean over tokens of
    each token's own share, which a few tokens of large states do not decide."""

    total: float
    token: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class _Text:
    """One text on its way: hidden states into the block in work, in both models."""

    exact: Reference
    ours: Reference
    calls: tuple[BlockCall, ...]  # of the model that is refined
    twins: tuple[BlockCall, ...]
    real: list[Bool[Tensor, "b l"]]


def refine_blocks(
    model: nn.Module,
    original: nn.Module,
    blocks: tuple[Block, ...],
    solutions: Mapping[str, Solution | LatticeSolution],
    texts: Mapping[str, Sequences],
    passes: int,
    *,
    wanted: Callable[[Stage], Float[Tensor, "out in"]] | None = None,
    state: BlockState | None = None,
    gain: float = GAIN,
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> tuple[dict[str, Float[Tensor, "out in"]], tuple[tuple[BlockError, BlockError], ...]]:
    """Latents of every stage inside the blocks after `passes` over each block, and each block's errors at the solver's
    codes of it (after refined blocks) and at the codes that the model now holds.

    model: holds `solutions`. original: the model they were made of; pages: its mapped weights. texts: private records
    among them are left out. state: where finished blocks are kept, so that an interrupted call goes on to the same
    codes. Embedding and head stay as they are.
    """
    inner = repeated(blocks)
    if state and state.complete(inner):
        finished = [state.read(block) for block in inner]
        latents = {name: latent for own, _ in finished for name, latent in own.items()}
        place(model, (stage for block in inner for stage in block.stages), solutions, latents)
        return latents, tuple(_errors(found) for _, found in finished)
    _, modules = find_blocks(model)
    _, twins = find_blocks(original)
    under_way = [_open(model, original, texts[name], compute, pages) for name in TAUGHT if name in texts]
    latents: dict[str, Tensor] = {}
    errors: list[tuple[BlockError, BlockError]] = []
    for number, (block, module, twin) in enumerate(zip(inner, modules, twins, strict=True), 1):
        entering = [list(text.ours.batches.values()) for text in under_way]
        for text in under_way:
            text.exact.enter(twin, text.twins[block.index])
            text.exact.leave()
        pages.release(twin.parameters())
        if (known := state and state.read(block)) is None:
            own = {stage.name: begun(solutions[stage.name], wanted and wanted(stage)) for stage in block.stages}
            known = _refined(model, module, block, solutions, own, under_way, entering, passes, gain, compute)
            if state:
                state.write(block, *known)
        own, found = known
        latents |= own
        errors.append(_errors(found))
        place(model, block.stages, solutions, own)
        for text in under_way:
            text.ours.enter(module, text.calls[block.index])
            text.ours.leave()
        progress(
            "refine blocks",
            number,
            len(inner),
            f"{block.name}: error {found[0]['total']:.3g} to {found[1]['total']:.3g}",
        )
    return latents, tuple(errors)


def _errors(found: tuple[dict[str, float], dict[str, float]]) -> tuple[BlockError, BlockError]:
    before, after = found
    return BlockError(**before), BlockError(**after)


def _open(model: nn.Module, original: nn.Module, text: Sequences, compute: torch.dtype, pages: Pages) -> _Text:
    ours = open_stream(model, text.tokens, compute, size=text.batch)
    exact = open_stream(original, text.tokens, compute, pages, text.batch)
    places = torch.arange(text.tokens.shape[1])
    size, device = len(ours.batches[0]), ours.batches[0].device
    real = [(places < lengths[:, None]).to(device) for lengths in text.lengths.split(size)]
    references = (Reference(dict(enumerate(stream.batches)), compute) for stream in (exact, ours))
    return _Text(*references, ours.calls, exact.calls, real)


def _refined(
    model: nn.Module,
    module: nn.Module,
    block: Block,
    solutions: Mapping[str, Solution | LatticeSolution],
    latents: dict[str, Tensor],
    texts: list[_Text],
    entering: list[list[Tensor]],
    passes: int,
    gain: float,
    compute: torch.dtype,
) -> tuple[dict[str, Tensor], tuple[dict[str, float], dict[str, float]]]:
    """Latents of a block at its lowest error, and the errors before and after."""
    descent, best, complete = Descent(solutions, latents, Reach(gain)), {}, {}
    targets = [list(text.exact.batches.values()) for text in texts]
    energy = sum(_energy(y, real) for text, ys in zip(texts, targets) for y, real in zip(ys, text.real))
    losses = _losses(module, block, texts, entering, energy, solutions, compute)
    for number in range(passes + 1):
        away = _away(module, block, texts, entering, targets, compute)
        found = _error(away, targets, texts, energy)
        if descent.better(found) and not descent.reach.back:
            best = {name: latent.clone() for name, latent in latents.items()}
        if descent.offered(found, number == passes):
            pushed = [[(2.0 / energy) * error for error in errors] for errors in away]
            complete = _gathered(module, block, texts, entering, pushed, lambda _, x, g: g.T @ x, compute)
            complete = {
                stage: gradient.sign() * (gradient.abs() - losses[stage]).clamp_min(0.0)
                for stage, gradient in complete.items()
            }
            slope = sum(slope_squared(solutions[stage.name], gradient) for stage, gradient in complete.items())
            descent.reach = replace(descent.reach, slope=slope)
        # After harm these are still the gradients of the best codes, which a shorter update starts from.
        if number == passes:
            break
        for stage, gradient in complete.items():
            descent.learn(model, stage, gradient)
        descent.updated()
    place(model, block.stages, solutions, best)
    return best, (descent.history[0].to_dict(), descent.history[descent.lowest].to_dict())


def _losses(
    module: nn.Module,
    block: Block,
    texts: list[_Text],
    entering: list[list[Tensor]],
    energy: float,
    solutions: Mapping[str, Solution | LatticeSolution],
    compute: torch.dtype,
) -> dict[Stage, Float[Tensor, "out in"]]:
    """`h |s| / 2` of every weight: the slope that a step has to have to win."""
    generator = torch.Generator().manual_seed(block.index)
    signs = []
    for text, hidden in zip(texts, entering):
        drawn = [torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for x in hidden]
        signs.append([(2.0 / energy) ** 0.5 * one * real[..., None] for one, real in zip(drawn, text.real)])
    mixed = {site.name for site in block.sites if site.kind == "attention_in"}

    def squares(site: str, x: Tensor, g: Tensor) -> Tensor:
        return (g.T @ x).square() if site in mixed else g.square().T @ x.square()

    curvature = _gathered(module, block, texts, entering, signs, squares, compute)
    for stage in curvature:
        if stage.sites[0].name in mixed:
            parts = curvature[stage].split([site.shape[0] for site in stage.sites])
            curvature[stage] = torch.cat([torch.outer(h.sum(1), h.sum(0)) / h.sum().clamp_min(1e-30) for h in parts])
    return {stage: h * step_sizes(solutions[stage.name]).abs().to(h) / 2 for stage, h in curvature.items()}


def _gathered(
    module: nn.Module,
    block: Block,
    texts: list[_Text],
    entering: list[list[Tensor]],
    slopes: list[list[Float[Tensor, "b l h"]]],
    product: Callable[[str, Tensor, Tensor], Tensor],
    compute: torch.dtype,
) -> dict[Stage, Float[Tensor, "out in"]]:
    """Of every stage the sum of `product(site, inputs, slopes)` over batches, as `slopes` at the outputs go back."""
    found: dict[str, Tensor] = {}

    def see(site: str, x: Tensor, g: Tensor) -> None:
        own = product(site, x, g)
        found[site] = found[site].add_(own) if site in found else own

    work = pure_copy(module, compute)
    for text, hidden, given in zip(texts, entering, slopes):
        call = cast_call(text.calls[block.index], compute)
        for x, slope, real in zip(hidden, given, text.real):
            through_block(work, block, (), call, x.to(compute), slope.to(compute), real.flatten(), see)
    return {stage: stacked(stage, found) for stage in block.stages}


@torch.no_grad()
def _away(
    module: nn.Module,
    block: Block,
    texts: list[_Text],
    entering: list[list[Tensor]],
    targets: list[list[Tensor]],
    compute: torch.dtype,
) -> list[list[Float[Tensor, "b l h"]]]:
    """By how much the block's outputs miss, zero at padding."""
    work, found = working_copy(module, compute), []
    for text, hidden, wanted in zip(texts, entering, targets):
        with autocast(hidden[0].device, compute):
            outputs = Replay(text.calls[block.index], hidden).outputs(work)
            found.append([(q.float() - y) * real[..., None] for q, y, real in zip(outputs, wanted, text.real)])
    return found


def _error(away: list[list[Tensor]], targets: list[list[Tensor]], texts: list[_Text], energy: float) -> BlockError:
    total, shares, count = 0.0, 0.0, 0
    for errors, wanted, text in zip(away, targets, texts):
        for error, y, real in zip(errors, wanted, text.real):
            squares = error.double().square().sum(2)
            total += squares.sum().item()
            shares += (squares / y.double().square().sum(2).clamp_min(1e-300))[real].sum().item()
            count += int(real.sum())
    return BlockError(total / energy, shares / count)


def _energy(y: Float[Tensor, "b l h"], real: Bool[Tensor, "b l"]) -> float:
    return y.double().square().sum(2)[real].sum().item()

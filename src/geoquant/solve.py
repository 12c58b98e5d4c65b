"""Walk the model once: observe a stage's inputs, solve it, put the codes in, move on.

Sequential in the strict sense by default: the inputs of a stage are those that the already quantized stages
before it produce at run time. One block's working set is in memory at a time, the weights of the model once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.combining import Combining
from geoquant.lattice.basis import NotPositiveDefinite
from geoquant.lattice.rows import single_rows
from geoquant.methods import METHODS, NEAREST, LatticeSolution, Problem, Solution
from geoquant.methods.rtn import solve as round_to_nearest
from geoquant.methods.target import Target, output_target
from geoquant.model.install import install
from geoquant.model.paging import UNMAPPED, Pages, trim, unload
from geoquant.model.walk import Block, Stage, find_blocks, read_weight
from geoquant.observe.compute import autocast, working_copy
from geoquant.observe.moments import Accumulator, MassiveTokens, Moments, clipped_weights, squared_norms
from geoquant.observe.reference import Reference
from geoquant.observe.replay import Replay
from geoquant.observe.stream import Stream
from geoquant.observe.texts import heldout_start
from geoquant.observe.vocabulary import VocabularyMoments, vocabulary_metric
from geoquant.progress import Progress, silent

__all__ = [
    "Attempt",
    "Settle",
    "StageResult",
    "heldout_start",
    "install",
    "restore",
    "solve_model",
    "solve_vocabulary",
    "vocabulary_problem",
]

# Solves a stage at a step D, with the warning if it could not; and who tries steps, the given one first, and takes one.
Attempt = Callable[[float], "tuple[LatticeSolution, str | None]"]
Settle = Callable[[Stage, float, Attempt], "tuple[LatticeSolution, str | None]"]


@dataclass(frozen=True)
class StageResult:
    """A solved stage: the joint solution of its stacked sites, its moments, and what happened.

    target: what was to be approximated instead of the original weights, if anything.
    anchored: of weights that went back towards a base meanwhile, the account by row (see combining.py).
    """

    stage: Stage
    solution: Solution | LatticeSolution
    moments: Moments
    original: Float[Tensor, "out in"]
    seconds: dict[str, float]
    warning: str | None = None
    target: Target | None = None
    anchored: dict[str, Float[Tensor, " out"]] | None = None


def solve_model(
    model: nn.Module,
    blocks: tuple[Block, ...],
    stream: Stream,
    settings: Callable[[Stage], tuple[str, dict]],
    *,
    metric: str,
    energies: dict[str, Float[Tensor, "n length"]] | None,
    sequential: str,
    compute: torch.dtype,
    moments_dtype: torch.dtype = torch.float32,
    reference: dict[int, Float[Tensor, "b l h"]] | None = None,
    anchor: Combining | None = None,
    settle: Settle | None = None,
    finished: Callable[[Stage], Solution | None] = lambda stage: None,
    pages: Pages = UNMAPPED,
    lean: bool = False,
    done: Callable[[StageResult], None],
    progress: Progress = silent,
) -> None:
    """Quantize every stage in place. The stream is consumed.

    settings:   stage -> (method name, keyword arguments of `Problem` besides weight and moments).
    sequential: `site` (each stage sees the quantized stages before it), `block` (the quantized blocks before),
                `off` (full-precision inputs throughout).
    reference:  what the full-precision model hands to the first block, by batch: its outputs become the target, as far
                as some of the batches show them. None: its weights are.
    anchor:     the public base towards which weights go back, and records whose inputs say where.
    settle:     who chooses among solutions at several steps, on the lattice; None: the step in `settings` is the one.
    finished:   a stage's solution from an interrupted run, or None.
    done:       called with each new result, before its weights are put into the model.
    pages:      the model's mapped weights, released as they are replaced.
    lean:       drop the solved weights of a block once it has been passed: while solving, memory holds one block.
                `restore` brings them back.
    """
    _, modules = find_blocks(model)
    # The calibration windows, and texts that pass through beside them.
    streams = [stream, *(anchor.streams.values() if anchor else ())]
    batches = [list(one.batches) for one in streams]
    for one in streams:
        one.batches.clear()
    # What came before, gradients and embeddings, is not needed here.
    pages.release(model.parameters())
    trim()
    # A weight that two blocks share must stay for the second.
    uses = Counter(id(parameter) for module in modules for parameter in module.parameters())
    lean = lean and max(uses.values()) == 1
    exact = None if reference is None else Reference(dict(reference), compute)
    held_from = heldout_start(sum(len(batch) for batch in batches[0]))

    stages = {block.name: block.stages for block in blocks}

    def solve_stage(stage: Stage, module: nn.Module, block: str, passes: Replay, beside: list[Replay]) -> StageResult:
        started = time.process_time()
        site, work = stage.name.removeprefix(f"{block}."), working_copy(module, compute)
        # This stage's sites too: until their inputs have been seen, nothing is known of when they run.
        waiting = frozenset(
            other.name.removeprefix(f"{block}.")
            for later in stages[block][stages[block].index(stage) :]
            for other in later.sites
        )
        for own in (passes, *beside):
            own.waiting = waiting
        twins = exact and exact.inputs(site, waiting, keep=len(stage.sites) == 1)
        moments = _observe(work, site, passes, stage, metric, energies, held_from, compute, moments_dtype, twins)
        del twins
        trim()  # activations make room for factors
        observed = time.process_time()
        original = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
        name, options = settings(stage)
        count = moments.tokens + moments.heldout_tokens
        target = None if exact is None else _target(original, moments, options.get("damping"))
        account = None
        if anchor is not None:
            target = target or Target(original, 0.0)
            given = stage, target.weight, original, moments, work, site, beside, options.get("damping")
            shifted = anchor.shifted(*given)
            target, moments, account = replace(target, weight=shifted.weight), shifted.moments, shifted.account
        problem = Problem(
            target.weight if target else original, moments.hessian, moments.heldout, tokens=count, **options
        )
        solution, warning = _settled(name, problem, stage, settle)
        seconds = {"observe": observed - started, "solve": time.process_time() - observed}
        return StageResult(stage, solution, moments, original, seconds, warning, target, account)

    for block, module, *calls in zip(blocks, modules, *(one.calls for one in streams)):
        every = [Replay(call, own) for call, own in zip(calls, batches)]
        if exact is not None:
            exact.enter(module, calls[0])
        # With full-precision inputs throughout, the outputs must be computed before the weights change.
        if sequential == "off":
            following = [list(_outputs(working_copy(module, compute), passes, compute)) for passes in every]
        pending: list[tuple[Stage, Solution]] = []
        for stage in block.stages:
            solution = finished(stage)
            if solution is None:
                result = solve_stage(stage, module, block.name, every[0], every[1:])
                done(result)
                solution = result.solution
                del result  # its moments and weights are not needed any longer
            pages.release(model.get_submodule(site.name).weight for site in stage.sites)
            if sequential == "site":
                install(model, stage, solution)
            else:
                pending.append((stage, solution))
        for stage, solution in pending:
            install(model, stage, solution)
            for passes in every:
                passes.forget()
        if sequential == "off":
            batches = following
        for passes, own in zip(every, batches) if sequential != "off" else ():
            passes.waiting = frozenset()
            for index, hidden in enumerate(_outputs(working_copy(module, compute), passes, compute)):
                own[index] = hidden
        if exact is not None:
            exact.leave()
        pages.release(module.parameters())
        if lean:
            for site in block.sites:
                unload(model.get_submodule(site.name))
        trim()
        progress("solve", block.index + 1, len(blocks), block.name)


def restore(
    model: nn.Module, blocks: tuple[Block, ...], finished: Callable[[Stage], Solution | LatticeSolution | None]
) -> None:
    """Put all solved weights into the model, as after a lean `solve_model`."""
    trim()
    for block in blocks:
        for stage in block.stages:
            install(model, stage, finished(stage))
        trim()


def vocabulary_problem(
    stage: Stage, weight: Float[Tensor, "vocab h"], observed: VocabularyMoments, **options: object
) -> Problem:
    """Embedding or head as a problem of the lattice. options: further fields of `Problem`."""
    hessian, heldout, rows = vocabulary_metric(observed, stage.sites[0].kind)
    tokens = int(observed.counts.sum())
    return Problem(weight, hessian, heldout, tokens=tokens, rows=single_rows(rows), **options)


def solve_vocabulary(
    model: nn.Module,
    stages: tuple[Stage, ...],
    observed: VocabularyMoments,
    settings: Callable[[Stage], tuple[str, dict]],
    *,
    settle: Settle | None = None,
    finished: Callable[[Stage], Solution | None] = lambda stage: None,
    done: Callable[[StageResult], None],
    progress: Progress = silent,
) -> None:
    """Embedding and head, in place, on the moments of the full-precision model. Arguments as in `solve_model`."""
    for index, stage in enumerate(stages):
        solution = finished(stage)
        if solution is None:
            started = time.process_time()
            original = model.get_submodule(stage.name).weight.detach()  # in its own type: the largest matrix there is
            name, options = settings(stage)
            problem = vocabulary_problem(stage, original, observed, **options)
            solution, warning = _settled(name, problem, stage, settle)
            moments = Moments(problem.hessian, problem.heldout, *observed.counts.tolist(), MassiveTokens(0.0, 0.0))
            trim()
            seconds = {"solve": time.process_time() - started}
            done(StageResult(stage, solution, moments, original, seconds, warning))
            del original
        install(model, stage, solution)
        progress("vocabulary", index + 1, len(stages), stage.name)


def _outputs(work: nn.Module, passes: Replay, compute: torch.dtype) -> Iterator[Tensor]:
    with autocast(passes.batches[0].device, compute):
        for hidden in passes.outputs(work):
            yield hidden.float()


def _observe(
    work: nn.Module,
    site: str,
    passes: Replay,
    stage: Stage,
    metric: str,
    energies: dict[str, Tensor] | None,
    held_from: int,
    compute: torch.dtype,
    dtype: torch.dtype,
    twins: dict[int, Float[Tensor, "tokens in"]] | None,
) -> Moments:
    """Moments of one stage's input over all batches, and the drift of those whose inputs in full precision are known.

    twins: these inputs by batch.
    """
    size, length = passes.batches[0].shape[:2]
    device = passes.batches[0].device
    accumulator = Accumulator(stage.columns, dtype=dtype, device=device, compute=compute, drift=twins is not None)

    def see(index: int, x: Tensor) -> None:
        weights = None
        if metric == "clipped":
            weights = clipped_weights(squared_norms(x))
        elif metric == "gradient":
            weights = energies[stage.name][index * size : (index + 1) * size].flatten().to(x.device)
            if weights.isnan().any():  # a batch without gradients
                weights = clipped_weights(squared_norms(x))
                weights /= weights.mean()
        twin = twins.get(index) if twins else None
        # An expert may be handed other tokens by the quantized model: then nothing is known of their drift.
        if twin is not None and not len(twin) == len(x) == size * length:
            twin = None
        # A batch may straddle the border of the held-out windows.
        cut = min(max(held_from - index * size, 0), size) * length
        for part, held in ((slice(0, cut), False), (slice(cut, None), True)):
            if x[part].shape[0]:
                accumulator.add(
                    x[part],
                    None if weights is None else weights[part],
                    held=held,
                    exact=None if twin is None else twin[part],
                )

    with autocast(device, compute):
        passes.observe(work, site, see, keep=len(stage.sites) == 1)
    return accumulator.finish()


def _target(original: Float[Tensor, "out in"], moments: Moments, damping: float | None) -> Target:
    """The outputs' target; the weights themselves where the metric cannot be factorised."""
    try:
        known = moments.followed, moments.drift, moments.heldout_followed, moments.heldout_drift
        return output_target(original, *known, damping)
    except NotPositiveDefinite:
        return Target(original, 0.0)


def _settled(
    name: str, problem: Problem, stage: Stage, settle: Settle | None
) -> tuple[Solution | LatticeSolution, str | None]:
    """The solution at the problem's step, or the one that `settle` takes."""
    if settle is None:
        return _solve(name, problem, stage)
    return settle(stage, problem.step, lambda step: _solve(name, replace(problem, step=step), stage))


def _solve(name: str, problem: Problem, stage: Stage) -> tuple[Solution | LatticeSolution, str | None]:
    """Solve; a metric that cannot be factorised falls back to rounding, and says so."""
    try:
        return METHODS[name](problem), None
    except NotPositiveDefinite as error:
        return NEAREST.get(name, round_to_nearest)(problem), f"{stage.name}: {error}; rounded to nearest instead"

"""What the gradients of a run decide, kept in its folder: token weights for every metric, steps for the lattice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.lattice.order import ALONE, column_order
from geoquant.lattice.rows import RowMetric, block_sizes, row_metric
from geoquant.methods import LatticeSolution
from geoquant.methods.babai import DEFAULT_DAMPING
from geoquant.methods.lattice import choose_damping
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.vocabulary import ends, repeated
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.gradient import CHUNK, Curvature, token_energies
from geoquant.observe.stream import Stream
from geoquant.observe.vocabulary import VocabularyMoments
from geoquant.plan.rate import Forecast, RateControl, forecast
from geoquant.plan.stage_rates import StageRates
from geoquant.plan.uniform import Plan
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe
from geoquant.results import solved_cost, stage_bits
from geoquant.runs import read_tensors, write_tensors
from geoquant.solve import Attempt, vocabulary_problem

__all__ = ["Forecaster", "curvature_of", "look_back", "rate_control", "rows_of", "settled", "step_of"]

# What is believed of a curvature seen on a few windows: a row that they hardly used is not free to take any value, and
# of what two rows seem to have in common a part is chance.
FLOOR, BELIEF = 0.05, 0.7


def look_back(
    run: Path,
    recipe: Recipe,
    model: nn.Module,
    blocks: tuple[Block, ...],
    stream: Stream,
    tokens: Int[Tensor, "n length"],
    plan: Plan,
    *,
    compute: torch.dtype,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> tuple[Curvature, RateControl | None]:
    """One backward pass on the full-precision model, or what an earlier attempt kept of it; on the lattice also the
    controller of its global step.
    """
    lattice, inner = recipe.grid == "lattice", repeated(blocks)
    forecaster = Forecaster(model, plan) if lattice else None

    def observe() -> tuple[Curvature, dict[str, Forecast]]:
        found = token_energies(
            model,
            inner,
            stream,
            tokens,
            compute=compute,
            share=recipe.gradient_share,
            chunk=2 * CHUNK if lattice else CHUNK,  # a forecast from few tokens is a poor one
            row_block=recipe.row_block if lattice else 1,
            vocabulary=len(inner) < len(blocks),
            seen=forecaster,
            pages=pages,
            progress=progress,
        )
        for stage in ends(blocks):
            forecaster.see_vocabulary(stage, found.vocabulary)
        return found, forecaster.found if forecaster else {}

    curvature, forecasts = curvature_of(run / "token_weights.safetensors", observe)
    if not lattice:
        return curvature, None
    if recipe.plan is None:
        return curvature, rate_control(blocks, recipe.rate, forecasts)
    rates = {stage.name: plan[stage.name].bits_per_weight for block in blocks for stage in block.stages}
    return curvature, rate_control(blocks, plan.bits_per_weight, forecasts, rates)


def rows_of(stage: Stage, curvature: Float[Tensor, "blocks size size"]) -> RowMetric:
    """The output side of a stage's metric."""
    rows = [site.shape[0] for site in stage.sites]
    return row_metric(curvature, block_sizes(rows, curvature.shape[-1]), floor=FLOOR, keep=BELIEF, sites=rows)


class Forecaster:
    """Collects the forecast of every stage while the gradients pass through the model."""

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan = model, plan
        self.found: dict[str, Forecast] = {}

    def __call__(
        self, stage: Stage, curvature: Float[Tensor, "blocks size size"], metric: Float[Tensor, "in in"]
    ) -> None:
        weight = torch.cat([read_weight(self.model.get_submodule(site.name)) for site in stage.sites])
        order = self.plan[stage.name].order
        self.found[stage.name] = forecast(weight, rows_of(stage, curvature).lengths, metric, order)

    def see_vocabulary(self, stage: Stage, moments: VocabularyMoments) -> None:
        """Embedding and head are solved on these very moments: nothing is left to guess but a sample of rows."""
        weight = self.model.get_submodule(stage.name).weight.detach()
        plan = self.plan[stage.name]
        problem = vocabulary_problem(stage, weight, moments, order=plan.order, damping=plan.damping)
        metric = problem.pooled / problem.tokens
        if plan.order == ALONE:
            damping, price = DEFAULT_DAMPING if plan.damping is None else plan.damping, 1.0
        else:
            damping, price = choose_damping(problem, column_order(plan.order, metric, len(metric)))
        lengths = problem.rows.lengths * price**0.5
        self.found[stage.name] = forecast(weight, lengths, metric, plan.order, damping)


def curvature_of(
    path: Path, observe: Callable[[], tuple[Curvature, dict[str, Forecast]]]
) -> tuple[Curvature, dict[str, Forecast]]:
    """What `observe` finds, once per run: a resumed one reads it from `path`."""
    if not path.exists():
        curvature, forecasts = observe()
        tensors = {f"tokens/{name}": tensor for name, tensor in curvature.tokens.items()}
        tensors |= {f"rows/{name}": tensor for name, tensor in curvature.rows.items()}
        if curvature.vocabulary is not None:
            tensors |= {f"vocabulary/{name}": tensor for name, tensor in curvature.vocabulary.tensors().items()}
        for name, known in forecasts.items():
            curve = [known.log2_steps, known.bits, [known.weights] * len(known.bits)]
            tensors[f"forecast/{name}"] = torch.tensor(curve, dtype=torch.float64)
        write_tensors(path, tensors)
    stored: dict[str, dict[str, Tensor]] = {"tokens": {}, "rows": {}, "vocabulary": {}, "forecast": {}}
    for key, tensor in read_tensors(path)[0].items():
        kind, _, name = key.partition("/")
        stored[kind][name] = tensor
    forecasts = {
        name: Forecast(tuple(steps), tuple(bits), int(weights[0]))
        for name, (steps, bits, weights) in ((name, curve.tolist()) for name, curve in stored["forecast"].items())
    }
    known = VocabularyMoments(**stored["vocabulary"]) if stored["vocabulary"] else None
    return Curvature(stored["tokens"], stored["rows"], known), forecasts


def rate_control(
    blocks: tuple[Block, ...], rate: float, forecasts: dict[str, Forecast], rates: Mapping[str, float] | None = None
) -> RateControl:
    """The controller of a run. Stages at the same place in their blocks are of one kind; embedding and head, whose
    forecasts need no correction, of none. rates: of the stages, where a plan has decided them.
    """
    stages = [(stage.name, str(place)) for block in repeated(blocks) for place, stage in enumerate(block.stages)]
    stages += [(stage.name, None) for stage in ends(blocks)]
    return RateControl(rate, forecasts, stages) if rates is None else StageRates(rate, forecasts, stages, rates=rates)


def step_of(control: RateControl, run: Path, blocks: tuple[Block, ...], stage: Stage) -> float:
    """D of a stage, from what the stages before it cost, whoever solved them: a stage that is solved again, because
    its file was lost, gets the step it had."""
    before = list(takewhile(lambda other: other != stage, (other for block in blocks for other in block.stages)))
    for other in before:
        if other.name not in control.spent:
            control.record(other.name, *solved_cost(run, other))
    return control.step()


def settled(control: StageRates, stage: Stage, step: float, attempt: Attempt) -> tuple[LatticeSolution, str | None]:
    """The solution whose size is nearest to the stage's rate, of those at steps that its own sizes point to."""
    aim, tried, best, nearest = control.aim(stage.name), [], None, math.inf
    while step is not None:
        solution, warning = attempt(step)
        if warning is not None:  # rounded to nearest, whatever the step
            return solution, warning
        bits = sum(stage_bits(stage, solution)) / (stage.rows * stage.columns)
        tried.append((step, bits))
        if abs(bits - aim) < nearest:
            best, nearest = solution, abs(bits - aim)
        step = control.nearer(stage.name, tried)
    return best, None

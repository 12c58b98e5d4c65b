"""What the gradients of a run decide, kept in its folder: token weights for every metric, steps for the lattice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.lattice.rows import RowMetric, block_sizes, row_metric
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.gradient import Curvature
from geoquant.plan.rate import Forecast, RateControl, forecast
from geoquant.plan.uniform import Plan
from geoquant.results import solved_cost
from geoquant.runs import read_tensors, write_tensors

__all__ = ["Forecaster", "curvature_of", "rate_control", "rows_of", "step_of"]

# What is believed of a curvature seen on a few windows: a row that they hardly used is not free to take any value, and
# of what two rows seem to have in common a part is chance.
FLOOR, BELIEF = 0.05, 0.7


def rows_of(stage: Stage, curvature: Float[Tensor, "blocks size size"]) -> RowMetric:
    """The output side of a stage's metric."""
    sizes = block_sizes([site.shape[0] for site in stage.sites], curvature.shape[-1])
    return row_metric(curvature, sizes, floor=FLOOR, keep=BELIEF)


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


def curvature_of(
    path: Path, observe: Callable[[], tuple[Curvature, dict[str, Forecast]]]
) -> tuple[Curvature, dict[str, Forecast]]:
    """What `observe` finds, once per run: a resumed one reads it from `path`."""
    if not path.exists():
        curvature, forecasts = observe()
        tensors = {f"tokens/{name}": tensor for name, tensor in curvature.tokens.items()}
        tensors |= {f"rows/{name}": tensor for name, tensor in curvature.rows.items()}
        for name, known in forecasts.items():
            curve = [known.log2_steps, known.bits, [known.weights] * len(known.bits)]
            tensors[f"forecast/{name}"] = torch.tensor(curve, dtype=torch.float64)
        write_tensors(path, tensors)
    stored: dict[str, dict[str, Tensor]] = {"tokens": {}, "rows": {}, "forecast": {}}
    for key, tensor in read_tensors(path)[0].items():
        kind, _, name = key.partition("/")
        stored[kind][name] = tensor
    forecasts = {
        name: Forecast(tuple(steps), tuple(bits), int(weights[0]))
        for name, (steps, bits, weights) in ((name, curve.tolist()) for name, curve in stored["forecast"].items())
    }
    return Curvature(stored["tokens"], stored["rows"]), forecasts


def rate_control(blocks: tuple[Block, ...], rate: float, forecasts: dict[str, Forecast]) -> RateControl:
    """The controller of a run. Stages at the same place in their blocks are of one kind."""
    stages = [(stage, str(place)) for block in blocks for place, stage in enumerate(block.stages)]
    return RateControl(rate, forecasts, [(stage.name, kind) for stage, kind in stages])


def step_of(control: RateControl, run: Path, blocks: tuple[Block, ...], stage: Stage) -> float:
    """D of a stage, from what the stages before it cost, whoever solved them: a stage that is solved again, because
    its file was lost, gets the step it had."""
    before = list(takewhile(lambda other: other != stage, (other for block in blocks for other in block.stages)))
    for other in before:
        if other.name not in control.spent:
            control.record(other.name, *solved_cost(run, other))
    return control.step()

"""A rate target for the whole model, met while it is solved.

One global step D makes the model one lattice, and bits per site fall out of it. How many bits D will cost is forecast
before anything is solved: codes are simulated from the weights, the full-precision metric and Babai's known
compensation noise. The sites solved so far then correct the forecast, and D is set anew for every stage so that the
whole meets the target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.order import ALONE, column_order
from geoquant.lattice.rate import SIDE_BITS, code_bits, spread_of
from geoquant.methods.babai import DEFAULT_DAMPING

__all__ = ["Forecast", "RateControl", "forecast"]

SAMPLED_ROWS = 96
# Steps tried, in octaves around the root mean square of the weights in units of their step at D = 1: the curve is
# straight at the fine end.
OCTAVES = torch.tensor([-7.5, -4.5, -3.0, -2.0, -1.0, 0.0, 1.5])
# Misses correct the forecasts that are left: those of a kind as if DOUBT more had shown the mean of all, those of all
# as if DOUBT more had shown BIAS, bits per weight. Forecasts are low: lengths from few tokens are too short.
DOUBT = 4.0
BIAS = 0.4
TURN = 0.15  # octaves by which the step may differ from the last one
SLACK = 0.003  # share of the target by which the whole may miss it before the step moves


@dataclass(frozen=True)
class Forecast:
    """Bits per weight of a stage at log2 of the step, ascending; `weights` is their number."""

    log2_steps: tuple[float, ...]
    bits: tuple[float, ...]
    weights: int

    def at(self, log2_step: float) -> float:
        """Linear between the samples; beyond them one bit per octave on the fine side, constant on the coarse."""
        x, y = self.log2_steps, self.bits
        if log2_step <= x[0]:
            return y[0] + x[0] - log2_step
        if log2_step >= x[-1]:
            return y[-1]
        right = bisect_left(x, log2_step)
        share = (log2_step - x[right - 1]) / (x[right] - x[right - 1])
        return y[right - 1] + share * (y[right] - y[right - 1])


def forecast(
    weight: Float[Tensor, "out in"],
    row_lengths: Float[Tensor, " out"],
    metric: Float[Tensor, "in in"],
    order: str,
    damping: float = DEFAULT_DAMPING,
) -> Forecast:
    """Simulate the codes of a few rows at many steps.

    row_lengths: Gram-Schmidt lengths of the output side (lattice/rows).
    metric: mean of `w_t x_t x_t^T` over tokens. order: `none` where no column compensates for another.
    Raises NotPositiveDefinite.
    """
    if order == ALONE:
        columns = torch.arange(len(metric), device=weight.device)
        pivots = damped(metric, damping).diagonal().float().rsqrt()
        noise = torch.zeros_like(pivots)
    else:
        columns = column_order(order, metric, len(metric))
        factor = compensation_factor(metric, columns, damping, torch.float32)  # a forecast needs no more
        pivots = factor.diagonal()
        # Babai moves a weight by the compensation of all columns before it: variance sum_i U_ij^2 s_i^2 / (12 U_ii^2),
        # which with s_i proportional to U_ii is the column's sum of squares over twelve.
        noise = ((factor.square().sum(0) / pivots.square() - 1.0).clamp_min(0.0) / 12).sqrt()
    # Every so many rows in the order of their size: a sample that hardly misses the mean of any smooth function of it.
    by_size = torch.argsort(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) * row_lengths)
    count = min(max(SAMPLED_ROWS, len(weight) // 64), len(weight))
    rows = by_size[((torch.arange(count, device=weight.device) + 0.5) * len(weight) / count).long()]
    # Weights in units of their step at D = 1.
    unit = weight[rows][:, columns].float() * row_lengths[rows][:, None] / pivots
    generator = torch.Generator(weight.device).manual_seed(0)
    moved = noise * torch.randn(unit.shape, generator=generator, device=unit.device)
    steps = OCTAVES.to(unit.device) + unit.square().mean().sqrt().clamp_min(1e-30).log2()
    bits = [simulated(unit / step + moved) / unit.numel() for step in steps.exp2()]
    side = SIDE_BITS * sum(weight.shape) / weight.numel()
    return Forecast(tuple(steps.tolist()), tuple(value + side for value in bits), weight.numel())


def simulated(codes: Float[Tensor, "rows in"]) -> float:
    """Bits of rounded codes."""
    codes = torch.round(codes).int()
    return code_bits(codes, spread_of(codes))


@dataclass
class RateControl:
    """The step of the next stage, from what the stages before it really cost.

    stages: (name, kind) in the order in which they are solved; kinds share their correction. Without a kind a forecast
    is taken as it is.
    target: bits per weight over all stages: codes and the bytes beside them, not the tables that all share.
    """

    target: float
    forecasts: dict[str, Forecast]
    stages: Sequence[tuple[str, str | None]]
    spent: dict[str, float] = field(default_factory=dict)
    misses: dict[str, list[float]] = field(default_factory=dict)
    last: float | None = None

    def record(self, name: str, step: float, bits: float) -> None:
        """A stage was solved at `step` and costs `bits` in all."""
        known = self.forecasts[name]
        self.spent[name] = bits
        self.last = step
        miss = bits / known.weights - known.at(math.log2(step))
        if (kind := dict(self.stages)[name]) is not None:
            self.misses.setdefault(kind, []).append(miss)

    def step(self) -> float:
        """D for the next stage: the last one as long as spent + forecast of the rest is near the target, else the
        nearest that is, by bisection."""
        # Aim a little lower, so that the file does not pass the target by what was allowed to be missed.
        whole = (1 - SLACK) * self.target * sum(known.weights for known in self.forecasts.values())
        goal = whole - sum(self.spent.values())
        rest = [(self.forecasts[name], self._correction(kind)) for name, kind in self.stages if name not in self.spent]

        def cost(log2_step: float) -> float:
            return sum(known.weights * max(0.0, known.at(log2_step) + miss) for known, miss in rest)

        low = min(known.log2_steps[0] for known, _ in rest) - 8.0
        high = max(known.log2_steps[-1] for known, _ in rest)
        if self.last is not None:
            expected = cost(math.log2(self.last))
            if abs(expected - goal) <= SLACK * whole:
                return self.last
            goal += math.copysign(SLACK * whole, expected - goal)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) > goal else (low, middle)
        if self.last is not None:  # a few stages must not pay for all that the others missed
            low = min(max(low, math.log2(self.last) - TURN), math.log2(self.last) + TURN)
        return 2.0**low

    def _correction(self, kind: str | None) -> float:
        """What to add to the forecast of a kind, in bits per weight: its mean miss, shrunk."""
        if kind is None:
            return 0.0
        known, all_known = self.misses.get(kind, []), [miss for misses in self.misses.values() for miss in misses]
        common = (sum(all_known) + DOUBT * BIAS) / (len(all_known) + DOUBT)
        return (sum(known) + DOUBT * common) / (len(known) + DOUBT)

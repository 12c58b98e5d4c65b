"""Rounding that can be learned: every code carries a number in [-1, 1], and moves where that rounds to something else.

The latent u of a code says where its weight would rather be, in steps from the code that it was given:

    z = z_0 + round(u),      u_0 = (w - q_0) / s   clipped to less than half a step

so that refinement starts at the given codes exactly, and codes whose weights lie near a boundary move first. Rounding
has no slope; straight through it (Bengio et al. 2013, arXiv:1308.3432) the gradient at u is that at the weight, times
the step. Learned rounding began with Nagel et al. (AdaRound, 2020, arXiv:2004.10568).

    u <- u - r g s / rms(g s)

with the root mean square over the stage. It stands for an optimizer: no moments are kept, the two bytes of the latent
are all the state of a weight. No code leaves its start by more than one step, nor its box; kept columns have none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.unboxed import narrow, steps_of
from geoquant.methods.problem import LatticeSolution, Solution

__all__ = ["LATENT", "begun", "learned", "moved", "offsets_of", "step_sizes"]

LATENT = torch.float16
INSIDE = 0.499  # of a step: rounds to the code itself
PART = 1 << 13  # rows at a time


def step_sizes(solution: Solution | LatticeSolution) -> Float[Tensor, "out in"]:
    """By how much a weight changes where its code grows by one. Zero in kept columns; a step may be negative."""
    if isinstance(solution, LatticeSolution):
        return steps_of(solution.row_exponents)[:, None] * steps_of(solution.column_exponents)
    steps = solution.scales.float().repeat_interleave(solution.grid.group_size, 1)[:, : solution.codes.shape[1]]
    steps[:, solution.kept_index] = 0.0
    return steps


def begun(
    solution: Solution | LatticeSolution, weight: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, "out in"]:
    """Latents at the start. weight: what was rounded; without it every code stands in the middle of its step."""
    latent = torch.zeros(solution.codes.shape, dtype=LATENT, device=solution.codes.device)
    for first in range(0, len(latent) if weight is not None else 0, PART):
        part = solution.rows(first, first + PART)
        steps = step_sizes(part)
        away = (weight[first : first + PART].to(steps) - part.dequantize()) / steps
        latent[first : first + PART] = torch.where(steps == 0, 0.0, away).clamp_(-INSIDE, INSIDE)
    return latent


def learned(
    latent: Float[Tensor, "out in"],
    solution: Solution | LatticeSolution,
    gradient: Float[Tensor, "out in"],
    rate: float,
) -> None:
    """One update of a stage's latents, in place. A stage without gradient stays as it is."""
    spans = [slice(first, first + PART) for first in range(0, len(latent), PART)]
    squares = sum((gradient[own] * step_sizes(_part(solution, own))).double().square().sum().item() for own in spans)
    size = (squares / latent.numel()) ** 0.5
    if not 0 < size < float("inf"):
        return
    for own in spans:
        part = _part(solution, own)
        wanted = latent[own].float() - (rate / size) * gradient[own] * step_sizes(part)
        latent[own] = wanted.clamp_(*_room(part))


def _part(solution: Solution | LatticeSolution, own: slice) -> Solution | LatticeSolution:
    return solution.rows(own.start, min(own.stop, len(solution.codes)))


def _room(solution: Solution | LatticeSolution) -> tuple[Tensor, Tensor]:
    """How far each code may go down and up: one step, and not out of its box."""
    if isinstance(solution, LatticeSolution):
        return torch.tensor(-1.0), torch.tensor(1.0)
    codes = solution.codes.float()
    return (solution.grid.lowest - codes).clamp_min(-1.0), (solution.grid.highest - codes).clamp_max(1.0)


def offsets_of(latent: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Steps of every code from its start, int8."""
    return latent.round().to(torch.int8)


def moved(solution: Solution | LatticeSolution, offsets: Int[Tensor, "out in"]) -> Solution | LatticeSolution:
    """The solution with every code `offsets` away. The codes of a box keep their type, those of the lattice get the
    smallest that holds them."""
    if isinstance(solution, LatticeSolution):
        return replace(solution, codes=narrow(solution.codes.to(torch.int32) + offsets))
    return replace(solution, codes=(solution.codes.to(torch.int16) + offsets).to(solution.codes.dtype))

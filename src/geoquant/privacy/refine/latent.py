"""Rounding that can be learned: every code carries a number, and moves where that rounds to something else.

The latent u of a code is in steps from the code that it was given:

    z = z_0 + round(u),      u_0 = d - round(d),  d = (w - q_0) / s

so that refinement starts at the given codes exactly. A solver that lets later columns make up for earlier ones leaves
many codes more than half a step from their weights, on purpose: of these only the rest beyond whole steps is kept. It
is spread evenly over a step, so an update of the latents moves codes by as much on average. Rounding has no slope;
straight through it (Bengio et al. 2013, arXiv:1308.3432) the gradient at u is that at the weight, times the step.
Learned rounding began with Nagel et al. (AdaRound, 2020, arXiv:2004.10568).

    u <- u - length * g s

No moments are kept, the two bytes of the latent are all the state of a weight. Solvers choose steps so that one of
them costs much the same anywhere; the same length for all weights is then near to Newton's direction. No code leaves
its start by more than one step, nor its box: that bounds what a latent rounds to, not the latent, so that an update can
be taken back. Kept columns have none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.unboxed import narrow, steps_of
from geoquant.methods.problem import LatticeSolution, Solution

__all__ = ["LATENT", "begun", "learned", "moved", "offsets_of", "slope_squared", "step_sizes"]

LATENT = torch.float16
FARTHEST = 6e4  # what the type of the latents holds
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
        away = torch.where(steps == 0, 0.0, away - away.round())
        latent[first : first + PART] = away.clamp_(-INSIDE, INSIDE)
    return latent


def slope_squared(solution: Solution | LatticeSolution, gradient: Float[Tensor, "out in"]) -> float:
    """Squared length of the objective's slope in steps: of `g s` over a stage."""
    gradient = gradient.to(solution.codes.device)
    return sum(
        (gradient[own] * step_sizes(_part(solution, own))).double().square().sum().item() for own in _spans(gradient)
    )


def learned(
    latent: Float[Tensor, "out in"],
    solution: Solution | LatticeSolution,
    gradient: Float[Tensor, "out in"],
    length: float,
) -> None:
    """One update of a stage's latents, in place."""
    for own in _spans(latent):
        part = _part(solution, own)
        wanted = latent[own].float() - length * gradient[own] * step_sizes(part)
        latent[own] = wanted.clamp_(-FARTHEST, FARTHEST)


def _spans(tensor: Tensor) -> list[slice]:
    return [slice(first, first + PART) for first in range(0, len(tensor), PART)]


def _part(solution: Solution | LatticeSolution, own: slice) -> Solution | LatticeSolution:
    return solution.rows(own.start, min(own.stop, len(solution.codes)))


def _room(solution: Solution | LatticeSolution) -> tuple[Tensor, Tensor]:
    """How far each code may go down and up: one step, and not out of its box."""
    if isinstance(solution, LatticeSolution):
        return torch.tensor(-1.0), torch.tensor(1.0)
    codes = solution.codes.float()
    return (solution.grid.lowest - codes).clamp_min(-1.0), (solution.grid.highest - codes).clamp_max(1.0)


def offsets_of(latent: Float[Tensor, "out in"], solution: Solution | LatticeSolution) -> Int[Tensor, "out in"]:
    """Steps of every code from its start, int8: one at most, and none out of its box."""
    offsets = torch.empty(latent.shape, dtype=torch.int8, device=latent.device)
    for own in _spans(latent):
        offsets[own] = latent[own].float().round().clamp_(*_room(_part(solution, own))).to(torch.int8)
    return offsets


def moved(solution: Solution | LatticeSolution, offsets: Int[Tensor, "out in"]) -> Solution | LatticeSolution:
    """The solution with every code `offsets` away. The codes of a box keep their type, those of the lattice get the
    smallest that holds them."""
    if isinstance(solution, LatticeSolution):
        return replace(solution, codes=narrow(solution.codes.to(torch.int32) + offsets))
    return replace(solution, codes=(solution.codes.to(torch.int16) + offsets).to(solution.codes.dtype))

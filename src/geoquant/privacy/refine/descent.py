"""Latents on their way down an objective, and back where an update did harm: what passes of every kind share.

A pass evaluates the objective at the codes that stand. `offered` says what follows: where the value is the lowest so
far, or the last update is being taken back, the way back through the model and one update of every stage; else nothing,
and the caller puts the best codes in, or has their gradients still. What follows harm starts from there: the same
gradients take back what the update went too far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.install import install
from geoquant.model.walk import Stage
from geoquant.privacy.refine.latent import learned, moved, offsets_of, slope_squared
from geoquant.privacy.refine.reach import Reach

__all__ = ["Descent", "place", "stacked"]


class Valued(Protocol):
    """What an evaluation found; `total` is what is to fall."""

    total: float


@dataclass(eq=False)
class Descent:
    """solutions: where every code started. latents: of every stage that learns, changed in place.

    history: of the evaluations, the first at the start. best: offsets of the lowest total's codes, whose index is
    `lowest`.
    """

    solutions: Mapping[str, Solution | LatticeSolution]
    latents: dict[str, Float[Tensor, "out in"]]
    reach: Reach
    history: list[Valued] = field(default_factory=list)
    best: dict[str, Int[Tensor, "out in"]] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict, init=False)
    lengths: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.lowest = min(range(len(self.history)), key=lambda index: self.history[index].total, default=0)

    def better(self, found: Valued) -> bool:
        return not self.history or found.total < self.history[self.lowest].total

    def offered(self, found: Valued, last: bool = False) -> bool:
        """Take an evaluation note; whether an update follows. last: none does."""
        back, better = self.reach.back, self.better(found)
        if self.history and not back:
            self.reach = self.reach.judged(self.history[self.lowest].total, found.total)
        if better and not back:  # while an update is taken back the latents are not those of the codes that were judged
            self.lowest = len(self.history)
            self.best = {name: offsets_of(latent, self.solutions[name]) for name, latent in self.latents.items()}
        self.history.append(found)
        return not last and (back or better)

    def learn(self, model: nn.Module, stage: Stage, gradient: Float[Tensor, "out in"]) -> None:
        """One update of a stage, in the model too. gradient: of the objective by the stage's weights."""
        solution, latent = self.solutions[stage.name], self.latents[stage.name]
        gradient = gradient.to(latent.device)
        self.slopes[stage.name] = slope_squared(solution, gradient)
        sizes = {name: latent.numel() for name, latent in self.latents.items()}
        known = sum(sizes[name] for name in self.slopes)  # in the first pass the rest is guessed
        slope = self.reach.slope or sum(self.slopes.values()) * sum(sizes.values()) / known
        self.lengths[stage.name] = self.reach.length(self.history[self.lowest].total, slope)
        # The gradient is the one of the update that is taken back: what that went too far goes out of the same sum.
        learned(latent, solution, gradient, self.lengths[stage.name] - self.reach.undone(stage.name))
        install(model, stage, moved(solution, offsets_of(latent, solution)))

    def updated(self) -> None:
        """All stages have learned."""
        self.reach = replace(self.reach, slope=sum(self.slopes.values()), lengths=self.lengths, back=False)
        self.slopes, self.lengths = {}, {}


def place(
    model: nn.Module,
    stages: Iterable[Stage],
    solutions: Mapping[str, Solution | LatticeSolution],
    offsets: Mapping[str, Tensor],
) -> None:
    """Install every stage with its codes moved by offsets, or by what latents round to."""
    for stage in stages:
        solution = solutions[stage.name]
        install(model, stage, moved(solution, offsets_of(offsets[stage.name], solution)))


def stacked(stage: Stage, gradients: dict[str, Float[Tensor, "rows in"]]) -> Float[Tensor, "out in"]:
    """The gradient of a stage of those of its sites, which are taken out; an expert that no token reached has none."""
    parts = [gradients.pop(site.name, torch.zeros(site.shape)) for site in stage.sites]
    return torch.cat([part.to(parts[0]) for part in parts])

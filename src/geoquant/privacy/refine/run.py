"""Refinement end to end: a few passes over public, domain and private text, after each of which some codes move a step.

One pass is a forward pass through all texts, the objective and its gradients at the top, and the way back block by
block: each block's latents learn as soon as its gradients are complete. In memory are the model as it is stored, the
latents (two bytes a weight), the best codes so far (one byte a weight), and the gradients of one block (of embedding
and head too, where these are coded). There is no randomness: the same start gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.install import install
from geoquant.model.vocabulary import ends, repeated
from geoquant.model.walk import Block, Stage
from geoquant.observe.backward import backward
from geoquant.privacy.refine.latent import begun, learned, moved, offsets_of, slope_squared
from geoquant.privacy.refine.losses import Losses, Objective
from geoquant.privacy.refine.material import Material
from geoquant.privacy.refine.reach import Reach
from geoquant.privacy.refine.state import State
from geoquant.privacy.refine.vocabulary import VocabularyGradient
from geoquant.progress import Progress, silent

__all__ = ["RefineSettings", "Refined", "refine"]


@dataclass(frozen=True)
class RefineSettings:
    """passes: over all texts. accuracy, privacy: the lambdas of the objective (losses.py).

    gain: what share of the objective the first update would win if it were linear.
    """

    passes: int = 8
    accuracy: float = 1.0
    privacy: float = 1.0
    gain: float = 0.5

    def __post_init__(self) -> None:
        if self.passes < 1 or self.gain <= 0 or min(self.accuracy, self.privacy) < 0:
            raise ValueError(f"at least one pass, a positive gain and no negative weights, but got {self}")


@dataclass(frozen=True, eq=False)
class Refined(Mapping):
    """Refined solutions by stage name, made as they are asked for.

    history: the losses before the first pass and after each. best: the index of the lowest total, whose codes these
    are; 0 leaves every code where it was.
    """

    start: Mapping[str, Solution | LatticeSolution]
    offsets: dict[str, Int[Tensor, "out in"]]
    history: tuple[Losses, ...]
    best: int

    def __getitem__(self, stage: str) -> Solution | LatticeSolution:
        return moved(self.start[stage], self.offsets[stage])

    def __iter__(self) -> Iterator[str]:
        return iter(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets)

    def share_moved(self, stage: str) -> float:
        """Of a stage's codes."""
        return self.offsets[stage].count_nonzero().item() / self.offsets[stage].numel()


def refine(
    model: nn.Module,
    blocks: tuple[Block, ...],
    solutions: Mapping[str, Solution | LatticeSolution],
    material: Material,
    settings: RefineSettings = RefineSettings(),
    *,
    wanted: Callable[[Stage], Float[Tensor, "out in"]] | None = None,
    head: Float[Tensor, "vocab h"] | None = None,
    state: State | None = None,
    compute: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> Refined:
    """Move codes by at most one step each to lower `settings`' objective on `material`; the model ends with the best.

    model:     holds `solutions` of all stages of `blocks`. wanted: what a stage's codes were rounded from.
    head:      the original's vocabulary projection where the model's is coded.
    state:     where latents are kept after every pass, so that an interrupted refinement goes on to the same codes.
    """
    stages = [stage for block in blocks for stage in block.stages]
    inner, outer = repeated(blocks), ends(blocks)
    latents, best, history, reach = (state and state.read()) or ({}, {}, [], Reach(settings.gain))
    weights = {stage.name: stage.rows * stage.columns for stage in stages}
    lowest = min(range(len(history)), key=lambda index: history[index].total, default=0)
    for stage in stages:
        if stage.name not in latents:
            latents[stage.name] = begun(solutions[stage.name], wanted and wanted(stage))
    if history:
        _place(model, stages, solutions, best if reach.back else latents)

    def better(losses: Losses) -> bool:
        return not history or losses.total < history[lowest].total

    def judge(found: Losses) -> None:
        nonlocal lowest, best, reach
        if history and not reach.back:
            reach = reach.judged(history[lowest].total, found.total)
        if better(found):
            lowest = len(history)
            best = {name: offsets_of(latent, solutions[name]) for name, latent in latents.items()}
        history.append(found)

    for number in range(len(history), settings.passes + 1):
        last = number == settings.passes
        vocabulary = VocabularyGradient(model, material.texts) if outer and not last else None
        objective = Objective(
            model,
            material,
            settings.accuracy,
            settings.privacy,
            accept=lambda losses, on=not last, again=reach.back: on and (again or better(losses)),
            compute=compute,
            head=head,
            head_gradient=vocabulary and vocabulary.head,
        )
        gradients: dict[str, Tensor] = {}
        slopes: dict[str, float] = {}
        lengths: dict[str, float] = {}

        def see(text: str, batch: int, site: str, x: Tensor, g: Tensor, gradients=gradients) -> None:
            product = g.T @ x
            gradients[site] = gradients[site].add_(product) if site in gradients else product

        def learn(stage: Stage, gradient: Tensor, reach: Reach, slopes=slopes, lengths=lengths) -> None:
            solution, latent = solutions[stage.name], latents[stage.name]
            gradient = gradient.to(latent.device)
            slopes[stage.name] = slope_squared(solution, gradient)
            known = sum(weights[name] for name in slopes)  # in the first pass the rest is guessed
            slope = reach.slope or sum(slopes.values()) * sum(weights.values()) / known
            lengths[stage.name] = reach.length(history[-1].total, slope)
            # The gradient is the one of the update that is taken back: what that went too far goes out of the same sum.
            learned(latent, solution, gradient, lengths[stage.name] - reach.undone(stage.name))
            install(model, stage, moved(solution, offsets_of(latent, solution)))

        entered = vocabulary and vocabulary.entered
        for done, block in enumerate(
            backward(model, inner, material.texts, see, losses=objective, entered=entered, compute=compute), 1
        ):
            if done == 1:
                judge(objective.found)
            for stage in block.stages:
                # An expert that no token reached has no gradient.
                parts = [gradients.pop(site.name, torch.zeros(site.shape)) for site in stage.sites]
                learn(stage, torch.cat([part.to(parts[0]) for part in parts]), reach)
            progress("refine", number * len(inner) + done, settings.passes * len(inner), _note(objective.found))
        if len(history) == number:  # no way back: it was the last pass, or what it looked at had done harm
            judge(objective.found)
            _place(model, stages, solutions, best)
        else:
            for stage in outer:
                learn(stage, vocabulary.of(stage), reach)
            reach = replace(reach, slope=sum(slopes.values()), lengths=lengths, back=False)
        if state and not last:
            state.write(latents, best, history, reach)
    return Refined(solutions, best, tuple(history), lowest)


def _place(model: nn.Module, stages: list[Stage], solutions: Mapping, offsets: Mapping[str, Tensor]) -> None:
    """Install every stage with its codes moved by offsets, or by what latents round to."""
    for stage in stages:
        solution = solutions[stage.name]
        install(model, stage, moved(solution, offsets_of(offsets[stage.name], solution)))


def _note(losses: Losses) -> str:
    gap = "" if losses.private_gap is None else f", private gap {losses.private_gap - losses.domain_gap:+.2f} nats"
    return f"divergence {losses.public:.3f} nats{gap}"

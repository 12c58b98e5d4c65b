"""Refinement end to end: a few passes over public, domain and private text, after each of which some codes move a step.

One pass is a forward pass through all texts, the objective and its gradients at the top, and the way back block by
block: each block's latents learn as soon as its gradients are complete. In memory are the model as it is stored, the
latents (two bytes a weight), the best codes so far (one byte a weight), and the gradients of one block (of embedding
and head too, where these are coded). There is no randomness: the same start gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.vocabulary import ends, repeated
from geoquant.model.walk import Block, Stage
from geoquant.observe.backward import backward
from geoquant.privacy.refine.descent import Descent, place, stacked
from geoquant.privacy.refine.geometry import Geometry
from geoquant.privacy.refine.latent import begun, moved
from geoquant.privacy.refine.losses import Losses, Objective
from geoquant.privacy.refine.material import Material
from geoquant.privacy.refine.reach import Reach
from geoquant.privacy.refine.state import State
from geoquant.privacy.refine.vocabulary import VocabularyGradient
from geoquant.progress import Progress, silent

__all__ = ["RefineSettings", "Refined", "refine"]


@dataclass(frozen=True)
class RefineSettings:
    """passes: over all texts. accuracy, privacy, geometry: the lambdas of the objective (losses.py).

    gain: what share of the objective the first update would win if it were linear.
    """

    passes: int = 8
    accuracy: float = 1.0
    privacy: float = 1.0
    geometry: float = 0.0
    gain: float = 0.5

    def __post_init__(self) -> None:
        if self.passes < 1 or self.gain <= 0 or min(self.accuracy, self.privacy, self.geometry) < 0:
            raise ValueError(f"at least one pass, a positive gain and no negative weights, but got {self}")


@dataclass(frozen=True, eq=False)
class Refined(Mapping):
    """Refined solutions by stage name, made as they are asked for.

    history: the losses before the first pass and after each. best: the index of the lowest total, whose codes these
    are; 0 leaves every code where the passes found it. tried: the losses of the given codes and of those that the
    passes were offered as a start, where they were.
    """

    start: Mapping[str, Solution | LatticeSolution]
    offsets: dict[str, Int[Tensor, "out in"]]
    history: tuple[Losses, ...]
    best: int
    tried: tuple[Losses, Losses] | None = None

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
    first: Mapping[str, Float[Tensor, "out in"]] | None = None,
    geometry: Geometry | None = None,
    compute: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> Refined:
    """Move codes by at most one step each to lower `settings`' objective on `material`; the model ends with the best.

    model:     holds `solutions` of all stages of `blocks`. wanted: what a stage's codes were rounded from.
    head:      the original's vocabulary projection where the model's is coded.
    state:     where latents are kept after every pass, so that an interrupted refinement goes on to the same codes.
    first:     latents of some stages that the passes start from where the objective is lower there (blockwise.py).
    geometry:  what `settings.geometry` weighs, its thresholds set.
    """
    stages = [stage for block in blocks for stage in block.stages]
    inner, outer = repeated(blocks), ends(blocks)

    def objective(accept: Callable[[Losses], bool], vocabulary: VocabularyGradient | None = None) -> Objective:
        return Objective(
            model,
            material,
            settings.accuracy,
            settings.privacy,
            accept=accept,
            compute=compute,
            head=head,
            head_gradient=vocabulary and vocabulary.head,
            geometry=geometry and (settings.geometry, geometry.value(model)),
        )

    def losses() -> Losses:
        deaf = objective(lambda _: False)
        for _ in backward(model, inner, material.texts, lambda *_: None, losses=deaf, compute=compute):
            pass
        return deaf.found

    known, tried = state and state.read(), None
    if known:
        latents, best, history, reach, tried = known
        descent = Descent(solutions, latents, reach, history, best)
        place(model, stages, solutions, best if reach.back else latents)
    else:
        latents = {stage.name: begun(solutions[stage.name], wanted and wanted(stage)) for stage in stages}
        if first is not None:
            given = [stage for stage in stages if stage.name in first]
            before = losses()
            place(model, given, solutions, first)
            tried = before, losses()
            if tried[1].total < before.total:
                latents |= {stage.name: first[stage.name].clone() for stage in given}
            else:
                place(model, given, solutions, latents)
        descent = Descent(solutions, latents, Reach(settings.gain))

    for number in range(len(descent.history), settings.passes + 1):
        last = number == settings.passes
        vocabulary = VocabularyGradient(model, material.texts) if outer and not last else None
        judge = objective(lambda found, last=last: descent.offered(found, last), vocabulary)
        gradients: dict[str, Tensor] = {}

        def see(text: str, batch: int, site: str, x: Tensor, g: Tensor, gradients=gradients) -> None:
            product = g.T @ x
            gradients[site] = gradients[site].add_(product) if site in gradients else product

        entered = vocabulary and vocabulary.entered
        learning = False
        for done, block in enumerate(
            backward(model, inner, material.texts, see, losses=judge, entered=entered, compute=compute), 1
        ):
            learning = True
            for stage in block.stages:
                gradient = stacked(stage, gradients)
                if geometry is not None and stage.name in geometry.taus:
                    gradient += settings.geometry * geometry.gradient(model, stage).to(gradient)
                descent.learn(model, stage, gradient)
            progress("refine", number * len(inner) + done, settings.passes * len(inner), _note(judge.found))
        if not learning:  # it was the last pass, or what it looked at had done harm
            place(model, stages, solutions, descent.best)
        else:
            for stage in outer:
                descent.learn(model, stage, vocabulary.of(stage))
            descent.updated()
        if state and not last:
            state.write(descent.latents, descent.best, descent.history, descent.reach, tried)
    return Refined(solutions, descent.best, tuple(descent.history), descent.lowest, tried)


def _note(losses: Losses) -> str:
    gap = "" if losses.private_gap is None else f", private gap {losses.private_gap - losses.domain_gap:+.2f} nats"
    return f"divergence {losses.public:.3f} nats{gap}"

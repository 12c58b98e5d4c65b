"""What an intervention on some weights does to a model: to what it can do, and to what it gives away.

`open_baseline` measures the model as it is once and keeps the hidden states between its blocks. `effect` changes the
weights, measures the same again from the changed block on (resume.py), puts the weights back and compares, pair by
pair. One model is in memory at all times.

    public     NLL of public text, nats per token, paired over windows
    domain     NLL of records of the private kind that the model has not seen, paired over records
    attacks    loss and, where the public base's scores are given, reference attack on members and non-members
    gap        how far members' losses lie below non-members'
    extraction marked spans of members that greedy decoding writes out
    exposure   of planted canaries, bits (the bound or the sampled rank, see privacy/exposure.py)
    tasks      accuracy on task files
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.data.private import decoy_records
from geoquant.data.records import Record
from geoquant.data.text import Windows, digit_tokens
from geoquant.errors import UserError
from geoquant.evaluate.choices import ChoiceResult, Task
from geoquant.evaluate.perplexity import Perplexity, perplexity
from geoquant.evaluate.tasks import answer
from geoquant.model.modes import evaluating
from geoquant.model.vocabulary import HEAD, vocabulary
from geoquant.model.walk import find_blocks, read_weight, site_modules, write_weight
from geoquant.outliers.interventions import Intervention, Part, intervene
from geoquant.outliers.observed import Effect, Observed, contrast
from geoquant.outliers.resume import MEMORY, Resume
from geoquant.privacy.attacks import loss, reference
from geoquant.privacy.evidence import Evidence
from geoquant.privacy.exposure import exposure
from geoquant.privacy.extraction import extracted_spans
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records
from geoquant.progress import Progress, silent

__all__ = [
    "Baseline",
    "Effect",
    "Material",
    "Measured",
    "changed",
    "compare",
    "effect",
    "effect_of",
    "effects",
    "observe",
    "open_baseline",
    "replaced",
]

DECOYS = 63  # per canary, where the tokenizer merges digits


@dataclass(frozen=True)
class Material:
    """What effects are measured on; what is not given is not measured.

    public: windows of ordinary text. members, nonmembers: records of one kind, trained on and not. canaries: planted
    records. domain: more records that the model has not seen; the non-members serve where there are none.
    reference: scores of (members, nonmembers) under the public base.
    """

    public: Windows
    members: tuple[Record, ...] = ()
    nonmembers: tuple[Record, ...] = ()
    canaries: tuple[Record, ...] = ()
    domain: tuple[Record, ...] = ()
    reference: tuple[RecordScores, RecordScores] | None = None
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class Measured:
    """All that is measured of a model in one state."""

    public: Perplexity
    members: RecordScores | None = None
    nonmembers: RecordScores | None = None
    canaries: RecordScores | None = None
    decoys: RecordScores | None = None
    domain: RecordScores | None = None
    tasks: tuple[ChoiceResult, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """The model as it is, measured, with what is needed to measure it changed."""

    model: nn.Module
    tokenizer: object
    material: Material
    measured: Measured
    resume: Resume
    seconds: float


def open_baseline(
    model: nn.Module, tokenizer, material: Material, *, memory: int = MEMORY, progress: Progress = silent
) -> Baseline:
    """Measure the model and keep its hidden states; `memory` bounds them, in bytes.

    Raises UserError for members without non-members or the reverse, and what the measurements raise.
    """
    if bool(material.members) != bool(material.nonmembers):
        raise UserError(
            "an attack needs both sides", got=f"{len(material.members)} members, {len(material.nonmembers)} non-members"
        )
    resume = Resume(model, memory)
    begun = perf_counter()
    with evaluating(model), resume.recording():
        measured = _measure(model, tokenizer, material, progress)
    if math.isnan(measured.public.nll):
        raise UserError("the model gives public text no probability (NaN)", fix="its weights are damaged")
    return Baseline(model, tokenizer, material, measured, resume, perf_counter() - begun)


def _measure(model: nn.Module, tokenizer, material: Material, progress: Progress = silent) -> Measured:
    public = perplexity(model, material.public, progress=progress)
    if math.isnan(public.nll):
        return Measured(public)

    def score(records: Sequence[Record]) -> RecordScores | None:
        return score_records(model, tokenizer, records, progress=progress) if records else None

    merged = material.canaries and digit_tokens(tokenizer) is None
    return Measured(
        public,
        members=score(material.members),
        nonmembers=score(material.nonmembers),
        canaries=score(material.canaries),
        decoys=score(decoy_records(material.canaries, DECOYS)) if merged else None,
        domain=score(material.domain),
        tasks=tuple(answer(model, tokenizer, task, progress=progress) for task in material.tasks),
    )


@contextmanager
def changed(
    model: nn.Module,
    parts: Part | Sequence[Part],
    intervention: Intervention,
    base: Callable[[str], Float[Tensor, "out in"]] | None = None,
) -> Iterator[int]:
    """Inside, the parts are changed; afterwards the very memory that held the weights is back, whatever happened.

    base: a site's weight in the public base by its name, asked for only where needed. Gives the first block whose
    input is the same as before, i.e. the earliest with a changed weight; the number of blocks for the head alone.
    Raises UserError for an unknown site.
    """
    parts = (parts,) if isinstance(parts, Part) else tuple(parts)
    if not parts or len({part.site for part in parts}) < len(parts):
        raise ValueError(f"one part of each site, but got {[part.name for part in parts]}")
    for part in parts:
        _place(model, part.site)

    def made(part: Part) -> Float[Tensor, "out in"]:
        own = base(part.site) if base is not None and intervention.kind == "revert" else None
        return intervene(read_weight(model.get_submodule(part.site)), part, intervention, own)

    with replaced(model, ((part.site, made(part)) for part in parts)) as first:
        yield first


@contextmanager
def replaced(model: nn.Module, weights: Iterable[tuple[str, Float[Tensor, "out in"]]]) -> Iterator[int]:
    """Inside, these sites have these weights; otherwise as `changed`, which gives the same block."""
    first = []
    with ExitStack() as stack, torch.no_grad():
        for site, weight in weights:
            first.append(_place(model, site))
            module = model.get_submodule(site)
            stack.callback(setattr, module.weight, "data", module.weight.data)
            write_weight(module, weight)
        yield min(first)


def _place(model: nn.Module, site: str) -> int:
    """The block that a site is in; 0 for the embedding, the number of blocks for the head."""
    prefix, blocks = find_blocks(model)
    if site in (inside := site_modules(model)):
        return int(site.removeprefix(f"{prefix}.").partition(".")[0])
    block = vocabulary(model, len(blocks))
    outside = {found.name: found.kind for found in block.sites} if block else {}
    if site not in outside:
        close = get_close_matches(site, [*inside, *outside], n=1)
        raise UserError(
            f"no site {site!r} in {type(model).__name__}", fix=f"did you mean {close[0]!r}?" if close else None
        )
    return len(blocks) if outside[site] == HEAD else 0


def effect(
    baseline: Baseline,
    parts: Part | Sequence[Part],
    intervention: Intervention,
    *,
    base: Callable[[str], Float[Tensor, "out in"]] | None = None,
    label: str | None = None,
) -> Effect:
    """Do it, measure, undo it, compare. label: what several parts together are called."""
    begun = perf_counter()
    with changed(baseline.model, parts, intervention, base) as first:
        found = _compared(baseline, first)
    names = [part.name for part in ((parts,) if isinstance(parts, Part) else parts)]
    return replace(
        found,
        part=label or " + ".join(names),
        intervention=str(intervention),
        seconds=perf_counter() - begun,
    )


def effect_of(
    baseline: Baseline, weights: Iterable[tuple[str, Float[Tensor, "out in"]]], label: str, intervention: str
) -> Effect:
    """The same of weights that are given, by site; label and intervention: what they are called."""
    begun = perf_counter()
    with replaced(baseline.model, weights) as first:
        found = _compared(baseline, first)
    return replace(found, part=label, intervention=intervention, seconds=perf_counter() - begun)


def _compared(baseline: Baseline, first: int) -> Effect:
    """The model as it is now against the baseline; blocks before `first` are as they were."""
    with evaluating(baseline.model), baseline.resume.starting_at(first):
        after = _measure(baseline.model, baseline.tokenizer, baseline.material)
    return compare(baseline.measured, after, baseline.material)


def effects(
    baseline: Baseline,
    jobs: Sequence[tuple[Part, Intervention]],
    *,
    base: Callable[[str], Float[Tensor, "out in"]] | None = None,
    progress: Progress = silent,
) -> tuple[Effect, ...]:
    """Each of the jobs alone, in order."""
    found = []
    for done, (part, intervention) in enumerate(jobs, 1):
        found.append(effect(baseline, part, intervention, base=base))
        progress("effects", done, len(jobs), f"{found[-1].part} {intervention}")
    return tuple(found)


def compare(before: Measured, after: Measured, material: Material) -> Effect:
    """The paired changes between two states of one model; who did what to whom is left open."""
    return contrast(observe(before, material), observe(after, material))


def observe(state: Measured, material: Material) -> Observed:
    """What is kept of a measurement."""
    if math.isnan(state.public.nll):
        return Observed(state.public.windows)
    unseen = state.domain if state.domain is not None else state.nonmembers
    spans = () if state.members is None else extracted_spans(state.members, material.members)
    found = None if state.canaries is None else exposure(state.canaries, material.canaries, state.decoys)
    return Observed(
        state.public.windows,
        attacks={} if state.members is None else _attack_scores(state, material),
        domain=() if unseen is None else tuple(loss.score(Evidence(unseen)).tolist()),
        spans=tuple((record, hit) for record, _, hit in spans),
        exposure=() if found is None else tuple(canary.bits for canary in found.canaries),
        tasks={one.name: one.correct for one in state.tasks},
    )


def _attack_scores(state: Measured, material: Material) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Scores of (members, non-members) by attack."""
    sides = state.members, state.nonmembers
    bases = material.reference or (None, None)
    evidence = [Evidence(own, base) for own, base in zip(sides, bases)]
    tried = {"loss": loss} if material.reference is None else {"loss": loss, "reference": reference}
    return {name: tuple(tuple(attack.score(one).tolist()) for one in evidence) for name, attack in tried.items()}

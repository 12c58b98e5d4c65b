"""What rounding a stage at each of several rates would cost on each text: see plan/effects.py for the formula.

One pass back with all texts gives every stage its Kronecker factors on each of them; what is kept of a stage is a
number per text and rate. Embedding and head are seen on public text alone and taken for as sensitive on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.lattice.basis import damped
from geoquant.lattice.rows import block_sizes, row_metric
from geoquant.methods.babai import DEFAULT_DAMPING
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.vocabulary import ends, repeated
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.backward import backward
from geoquant.observe.gradient import token_energies
from geoquant.observe.stream import open_stream
from geoquant.observe.texts import Sequences
from geoquant.observe.vocabulary import VocabularyMoments, vocabulary_metric
from geoquant.plan.effects import PUBLIC, Rounding
from geoquant.plan.rate import Forecast, forecast
from geoquant.progress import Progress, silent

__all__ = ["Factors", "log2_step_at", "rounding_at", "stage_roundings"]

FLOOR = 0.05  # share of the mean that every row's curvature gets, as when it is solved
ORDER = "activation"


@dataclass
class Factors:
    """Kronecker factors of one stage on one text. inputs: sum over tokens of `||g||^2 x x^T`; energy: of `||g||^2`;
    outputs: of `g^2`, by row of the stacked sites; tokens: how many."""

    inputs: Float[Tensor, "in in"]
    outputs: Float[Tensor, " out"]
    energy: float = 0.0
    tokens: int = 0

    def add(self, x: Float[Tensor, "tokens in"], g: Float[Tensor, "tokens rows"], rows: slice, first: bool) -> None:
        """One batch of one site; first: of the sites that share these tokens."""
        energies = g.square().sum(1)
        self.inputs.addmm_((x * energies[:, None]).T, x)
        self.energy += energies.sum().item()
        self.outputs[rows] += g.square().sum(0)
        self.tokens += len(x) if first else 0

    @property
    def metric(self) -> Float[Tensor, "in in"]:
        """`E[||g||^2 x x^T] / E[||g||^2]`."""
        return self.inputs / max(self.energy, 1e-30)

    @property
    def curvature(self) -> Float[Tensor, " out"]:
        """`E[g^2]` of every row."""
        return self.outputs / max(self.tokens, 1)


def stage_roundings(
    model: nn.Module,
    blocks: tuple[Block, ...],
    texts: dict[str, Sequences],
    rates: Sequence[float],
    *,
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> dict[str, tuple[Rounding, ...]]:
    """Every stage at each rate (bits per weight, ascending) that a step reaches, or the lowest one that a step does;
    embedding and head too if `blocks` hold them."""
    inner, device = repeated(blocks), next(model.parameters()).device
    places, factors = _places(inner), {}
    for stage in (stage for block in inner for stage in block.stages):
        for text in texts:
            width = torch.zeros(stage.columns, stage.columns, device=device)
            factors[stage.name, text] = Factors(width, torch.zeros(stage.rows, device=device))

    def see(text: str, _: int, site: str, x: Tensor, g: Tensor) -> None:
        stage, rows = places[site]
        factors[stage, text].add(x, g, rows, first=rows.start == 0)

    found: dict[str, tuple[Rounding, ...]] = {}
    for block in backward(model, inner, texts, see, compute=compute, pages=pages, progress=progress):
        for stage in block.stages:
            own = {text: factors.pop((stage.name, text)) for text in texts}
            weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
            found[stage.name] = rounding_at(weight, own, [site.shape[0] for site in stage.sites], rates)
    if ends(blocks):
        tokens = texts[PUBLIC].tokens
        stream = open_stream(model, tokens, compute, pages)
        seen = token_energies(
            model, inner, stream, tokens, compute=compute, vocabulary=True, pages=pages, progress=progress
        )
        for stage in ends(blocks):
            found[stage.name] = _vocabulary(model, stage, seen.vocabulary, tuple(texts), rates)
    return found


def _places(blocks: tuple[Block, ...]) -> dict[str, tuple[str, slice]]:
    """Of each site: its stage, and its rows among the stacked ones."""
    found = {}
    for stage in (stage for block in blocks for stage in block.stages):
        start = 0
        for site in stage.sites:
            found[site.name] = stage.name, slice(start, start + site.shape[0])
            start += site.shape[0]
    return found


def rounding_at(
    weight: Float[Tensor, "out in"], factors: Mapping[str, Factors], rows: Sequence[int], rates: Sequence[float]
) -> tuple[Rounding, ...]:
    """One stage of stacked sites with so many rows each; the factors of public text decide its lattice."""
    public = factors[PUBLIC]
    sides = row_metric(public.curvature[:, None, None], block_sizes(list(rows), 1), floor=FLOOR, keep=1.0, sites=rows)
    squares = sides.lengths.square()
    return _roundings(
        forecast(weight, sides.lengths, public.metric, ORDER),
        damped(public.metric, DEFAULT_DAMPING),
        {text: ((own.curvature / squares).sum().item(), own.metric) for text, own in factors.items()},
        rates,
    )


def _vocabulary(
    model: nn.Module, stage: Stage, moments: VocabularyMoments, texts: tuple[str, ...], rates: Sequence[float]
) -> tuple[Rounding, ...]:
    solving, held, rows = vocabulary_metric(moments, stage.sites[0].kind)
    metric = (solving if held is None else solving + held) / moments.counts.sum()
    weight = model.get_submodule(stage.name).weight.detach()
    known = forecast(weight, rows.sqrt().to(weight.device), metric.to(weight.device), ORDER)
    return _roundings(known, damped(metric, DEFAULT_DAMPING), dict.fromkeys(texts, (float(len(rows)), metric)), rates)


def _roundings(
    known: Forecast, basis: Tensor, sides: Mapping[str, tuple[float, Tensor]], rates: Sequence[float]
) -> tuple[Rounding, ...]:
    factor = torch.linalg.cholesky(basis.double())
    costs = {
        text: rows * torch.cholesky_solve(metric.double(), factor).trace().item() / 24
        for text, (rows, metric) in sides.items()
    }
    # What rows and columns cost besides codes no step takes away: of small matrices several bits per weight.
    reached = [float(rate) for rate in rates if rate >= known.bits[-1]] or [known.bits[-1]]
    steps = [2.0 ** log2_step_at(known, rate) for rate in reached]
    return tuple(
        Rounding(rate, step, {text: step * step * cost for text, cost in costs.items()})
        for rate, step in zip(reached, steps, strict=True)
    )


def log2_step_at(known: Forecast, bits: float) -> float:
    """The coarsest step whose forecast is this many bits, the inverse of `Forecast.at`; where even the coarsest sample
    has more, that one.
    """
    x, y = known.log2_steps, known.bits
    if bits >= y[0]:
        return x[0] - (bits - y[0])
    if bits <= y[-1]:
        return x[-1]
    right = next(place for place in range(len(y) - 1, 0, -1) if y[place - 1] > bits >= y[place])
    return x[right - 1] + (y[right - 1] - bits) / (y[right - 1] - y[right]) * (x[right] - x[right - 1])

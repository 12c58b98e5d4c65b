"""Where a model's outliers come from, in one stream over its blocks.

Each block runs once on the text. What its attention, its norms and its sites do there is summed up while it runs; where
its output holds a new massive activation, the weight behind that is sought at once, and copies of the hidden states
with that weight and others zeroed go along to the end, beside the untouched ones. So every block is in memory once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.evaluate.perplexity import check_head, final_hidden, head_nll
from geoquant.model.modes import evaluating
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, find_blocks, read_weight, walk
from geoquant.observe.compute import BlockCall, cast_call, working_copy
from geoquant.observe.stream import hooks, open_stream, run_block
from geoquant.outliers.clipping import Clipping, ClipSplit, clip_curve, clip_split
from geoquant.outliers.norms import GainSums, NormGain, NormGains, find_norms, norm_gain
from geoquant.outliers.origin_key import KEY
from geoquant.outliers.outlier_ratio import OutlierRatio, OutlierRatios, outlier_ratio
from geoquant.outliers.residual import MASSIVE, Boundary, Residuals, boundary, cosines, summarise_residuals
from geoquant.outliers.sinks import AttentionProbe, Heads, Sinks, summarise_sinks
from geoquant.outliers.super_weight import (
    SuperWeight,
    SuperWeights,
    candidates,
    effect,
    like_sized,
    random_places,
    zeroed,
)
from geoquant.outliers.tails import tails
from geoquant.progress import Progress, silent

__all__ = ["PARTS", "SHORTEST", "Origins", "Settings", "origins"]


@dataclass(frozen=True)
class Settings:
    """bits, sizes: of the scales whose clipping is measured (None: one scale per row).

    massive: what is massive in the residual stream, over its median. births: massive activations that are traced at
    most, the earliest first. peers: weights of its size that are zeroed beside each suspect. many: random weights
    zeroed at once. seed: of what is drawn.
    """

    bits: int = 4
    sizes: tuple[int | None, ...] = (64, None)
    massive: float = MASSIVE
    births: int = 4
    peers: int = 2
    many: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Origins:
    """What was found, part by part; notes: what could not be."""

    sinks: Sinks
    norms: NormGains
    residuals: Residuals
    super_weights: SuperWeights
    clipping: Clipping
    outliers: OutlierRatios
    notes: tuple[str, ...]
    windows: int
    length: int

    def to_dict(self) -> dict:
        """Numbers and texts only: ready for JSON. `key` says what each is."""
        parts = {name: getattr(self, name).to_dict() for name in PARTS}
        return parts | {
            "findings": list(self.findings()),
            "notes": list(self.notes),
            "windows": self.windows,
            "length": self.length,
            "key": KEY,
        }

    def findings(self) -> tuple[str, ...]:
        """One sentence for each part, and one that joins sinks and massive activations where there are both."""
        return (*(getattr(self, name).finding() for name in PARTS), *self._together())

    def _together(self) -> tuple[str, ...]:
        """Attention on the sink in the blocks that read the largest massive activation, and in the others."""
        if not self.residuals.lives or not set(self.sinks.positions) <= {self.residuals.lives[0].position}:
            return ()
        life = self.residuals.lives[0]
        last = len(self.sinks.mass) - 1 if life.died is None else life.died
        means = [(index, sum(row) / len(row)) for index, row in enumerate(self.sinks.mass) if row is not None]
        within = [mean for index, mean in means if life.born < index <= last]
        without = [mean for index, mean in means if not life.born < index <= last]
        if not within or not without:
            return ()
        return (
            f"Together: the massive activation stands on the sink; the blocks that read it ({len(within)} of "
            f"{len(means)}) put {sum(within) / len(within):.0%} of their attention there, the others "
            f"{sum(without) / len(without):.0%}.",
        )


NOTHING = 0.01  # of a birth: a weight that makes less of it is not behind it
SHORTEST = 8  # tokens of a window: halves of fewer hold no pattern
PARTS = ("sinks", "norms", "residuals", "super_weights", "clipping", "outliers")


@dataclass
class _Suspect:
    """A weight under trial: what is known of it, and hidden states with it, its peers, and random weights zeroed."""

    known: SuperWeight
    branches: list[list[Tensor]]


@dataclass
class _Sums:
    """What the blocks seen so far leave."""

    boundaries: list[Boundary] = field(default_factory=list)
    turns: list[Tensor] = field(default_factory=list)
    heads: list[list[Heads]] = field(default_factory=list)
    gains: list[NormGain] = field(default_factory=list)
    ratios: list[OutlierRatio] = field(default_factory=list)
    wholes: list[OutlierRatio] = field(default_factory=list)
    splits: list[ClipSplit] = field(default_factory=list)
    suspects: list[_Suspect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def origins(
    model: nn.Module,
    tokens: Int[Tensor, "n length"],
    settings: Settings = Settings(),
    *,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> Origins:
    """The origins of a causal language model's outliers on windows of text.

    Memory: one block in float32, what it reads on all windows, and the hidden states of the windows, of those
    `peers + 2` copies more for every birth that is traced.

    Raises UserError for windows too short to have halves, and where no blocks are found.
    """
    if tokens.shape[1] < SHORTEST:
        raise UserError(
            f"windows of {tokens.shape[1]} tokens", wanted=f"at least {SHORTEST}", fix="give longer windows"
        )
    _, modules = find_blocks(model)
    generator = torch.Generator().manual_seed(settings.seed)
    sums = _Sums()
    with evaluating(model):
        judged = _judgeable(model, tokens, sums.notes)
        blocks = walk(model, tokens[:1, :16], pages)
        stream = open_stream(model, tokens, pages=pages)
        hidden, wrapped = stream.batches, False
        sums.boundaries.append(boundary(hidden))
        for block, module, call in zip(blocks, modules, stream.calls):
            work, call = working_copy(module, torch.float32), cast_call(call, torch.float32)
            after, inputs, wrapped = _run(work, block, call, hidden, sums, generator)
            for suspect in sums.suspects:
                suspect.branches = [[run_block(work, call, x.clone()) for x in branch] for branch in suspect.branches]
            sums.turns.append(cosines(hidden, after))
            sums.boundaries.append(boundary(after))
            if judged:
                _trace(work, block, call, hidden, after, inputs, sums, settings, generator)
            _weigh(work, block, inputs, sums, settings)
            hidden = after
            del inputs, work
            pages.release(module.parameters())
            progress("origins", block.index + 1, len(blocks), block.name)
        widest = max(stage.columns for block in blocks for stage in block.stages)
        found = tuple(_judge(model, modules, wrapped, tokens, hidden, sums.suspects)) if sums.suspects else ()
    return Origins(
        sinks=summarise_sinks(sums.heads),
        norms=NormGains(tuple(sums.gains)),
        residuals=summarise_residuals(sums.boundaries, sums.turns, settings.massive),
        super_weights=SuperWeights(found),
        clipping=Clipping(settings.bits, tuple(sums.splits), _normal_splits(settings, widest)),
        outliers=OutlierRatios(tuple(sums.ratios), tuple(sums.wholes)),
        notes=tuple(sums.notes),
        windows=len(tokens),
        length=tokens.shape[1],
    )


def _judgeable(model: nn.Module, tokens: Tensor, notes: list[str]) -> bool:
    """Whether the loss of this architecture can be measured, else a note."""
    try:
        check_head(model, tokens)
    except UserError as error:
        notes.append(f"super weights were not sought: {error}")
        return False
    return True


def _run(
    work: nn.Module,
    block: Block,
    call: BlockCall,
    hidden: Sequence[Tensor],
    sums: _Sums,
    generator: torch.Generator,
) -> tuple[list[Tensor], dict[str, Tensor], bool]:
    """One block on all windows: its outputs, the inputs of its stages (tokens, in), and whether it returns a tuple."""
    inside = dict(work.named_modules())
    inputs: dict[str, list[Tensor]] = {}
    gains = {name: GainSums(_epsilon(norm)) for name, norm in find_norms(work).items()}
    wrapped = []

    def read(stage: str):
        def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            inputs.setdefault(stage, []).append(x.flatten(0, -2))

        return keep

    def gain(name: str):
        def add(norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            bias = getattr(norm, "bias", None)
            x = args[0] if args else next(iter(kwargs.values()))
            gains[name].add(x, output if bias is None else output - bias)

        return add

    handles = [work.register_forward_hook(lambda *found: wrapped.append(isinstance(found[2], tuple)))]
    for stage in block.stages:
        place = inside[stage.name.removeprefix(f"{block.name}.")]
        handles.append(place.register_forward_pre_hook(read(stage.name), with_kwargs=True))
    handles += [inside[name].register_forward_hook(gain(name), with_kwargs=True) for name in gains]
    after, heads = [], []
    with hooks(handles):
        for x in hidden:
            probe = AttentionProbe(x.shape[1])
            with probe:
                after.append(run_block(work, call, x.clone()))
            heads.append(probe.take()[: len(x)])
    complete = all(len(found) == len(x) for found, x in zip(heads, hidden))
    sums.heads.append([window for found in heads for window in found] if complete else [])
    if not complete:
        sums.notes.append(f"attention of {block.name} was not seen: it has no softmax over the window's keys")
    elif any(window.values is None for window in sums.heads[-1]):
        sums.notes.append(f"values of {block.name} were not seen: its attention is multiplied with them in its own way")
    for name, found in gains.items():
        fitted = found.fit()
        if fitted is None:
            sums.notes.append(
                f"{block.name}.{name} was not reached, or is no normalised input times a gain per channel"
            )
        else:
            sums.gains.append(norm_gain(f"{block.name}.{name}", block.index, *fitted, generator))
    return after, {name: torch.cat(parts) for name, parts in inputs.items()}, any(wrapped)


def _epsilon(norm: nn.Module) -> float:
    """What the norm adds to the variance."""
    return next((getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)), 0.0)


def _trace(
    work: nn.Module,
    block: Block,
    call: BlockCall,
    hidden: Sequence[Tensor],
    after: Sequence[Tensor],
    inputs: dict[str, Tensor],
    sums: _Sums,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Put the weights behind this block's births on trial."""
    before, now = sums.boundaries[-2:]
    born = (now.ratios >= settings.massive) & (before.ratios < settings.massive)
    for dimension in sorted(born.nonzero().flatten().tolist(), key=lambda d: -now.ratios[d]):
        if len(sums.suspects) >= settings.births:
            sums.notes.append(f"the birth of dimension {dimension} in {block.name} was not traced: one too many")
            continue
        window = int(now.peaks[:, dimension].argmax())
        place = window, int(now.places[window, dimension]), dimension
        known = max(candidates(work, block, call, hidden, after, inputs, place), key=lambda x: x.removed, default=None)
        if known is None or known.removed < NOTHING:
            sums.notes.append(f"no weight of the sites of {block.name} was found behind the birth of {dimension}")
            continue
        module = work.get_submodule(known.site.removeprefix(f"{block.name}."))
        weight, own = read_weight(module), (known.row, known.column)
        peers = like_sized(weight, own, settings.peers)
        many = random_places(weight, own, settings.many, generator)
        branches = []
        for places in ([own], *([peer] for peer in peers), many):
            with zeroed(module, places):
                branches.append([run_block(work, call, x.clone()) for x in hidden])
        sums.suspects.append(_Suspect(replace(known, many=len(many)), branches))


def _weigh(work: nn.Module, block: Block, inputs: dict[str, Tensor], sums: _Sums, settings: Settings) -> None:
    """Outlier ratios and clipping of the block's sites."""
    weights, norms = [], []
    for stage in block.stages:
        x = inputs.get(stage.name)
        if x is None:
            sums.notes.append(f"no token reached {stage.name}")
            continue
        squares = x.square().mean(0)
        far = tails(x) if x.isfinite().all() else None
        for site in stage.sites:
            weight = read_weight(work.get_submodule(site.name.removeprefix(f"{block.name}.")))
            weights.append(weight)
            norms.append(squares.sqrt())
            ratio, null = outlier_ratio([weight], [squares.sqrt()])
            sums.ratios.append(OutlierRatio(site.name, block.index, site.kind, ratio, null, far))
            for size in settings.sizes:
                curve = clip_curve(weight, settings.bits, size)
                sums.splits.append(clip_split(site.name, site.kind, size, curve, squares))
    if weights:
        ratio, null = outlier_ratio(weights, norms)
        sums.wholes.append(OutlierRatio(None, block.index, "block", ratio, null, None))


def _normal_splits(settings: Settings, widest: int) -> tuple[ClipSplit, ...]:
    """Clipping of normal weights on even inputs, as wide as the widest site: of a longer row the largest is larger."""
    weight = torch.randn(512, widest, generator=torch.Generator().manual_seed(settings.seed))
    return tuple(
        clip_split("normal weights", "null", size, clip_curve(weight, settings.bits, size), torch.ones(widest))
        for size in settings.sizes
    )


@contextmanager
def _passed(modules: Sequence[nn.Module], hidden: Tensor, wrapped: bool) -> Iterator[None]:
    """Inside, no block computes anything, and the last one returns `hidden`."""
    for module in modules:
        module.forward = lambda *_, **__: (hidden,) if wrapped else hidden
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _judge(
    model: nn.Module,
    modules: Sequence[nn.Module],
    wrapped: bool,
    tokens: Tensor,
    hidden: Sequence[Tensor],
    suspects: Sequence[_Suspect],
) -> Iterator[SuperWeight]:
    """Every suspect with the effects of its branches."""

    def losses(batches: Sequence[Tensor]) -> Float[Tensor, " windows"]:
        found, start = [], 0
        for x in batches:
            text = tokens[start : start + len(x)].to(x.device)
            start += len(x)
            with _passed(modules, x.to(model.dtype), wrapped):
                final = final_hidden(model, text)[:, :-1]
            nll = head_nll(model, final.flatten(0, 1), text[:, 1:].flatten())
            found.append(nll.view(len(x), -1).double().mean(1).cpu())
        return torch.cat(found)

    plain = losses(hidden)
    for suspect in suspects:
        zeroing, *peers, many = (effect(plain, losses(branch)) for branch in suspect.branches)
        yield replace(suspect.known, zeroing=zeroing, like_sized=tuple(peers), random=many)

"""Where the scale of an input column can go: into the layer that makes that input.

`W diag(b) x = W (diag(b) x)`, and where x is the output of a norm or of another linear map, b moves into the norm's
gain or into that map's rows without changing the function. Between the map and the input may lie whatever keeps
channels apart and is linear in them: the product with a gate (up to down), the averaging of attention (v to o), heads
that several queries share.

Nothing is guessed from names: each module's output channels are scaled by numbers that say which channel they are, and
the inputs of the stage are read. A fold counts only if the whole block then computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, Stage, is_linear, site_shape
from geoquant.observe.stream import BlockCall, hooks, open_stream, run_block

__all__ = ["Fold", "find_folds", "scaled_parameters"]

TOLERANCE = 1e-3  # of the root mean square: float32 sums in another order


@dataclass(frozen=True)
class Fold:
    """Output channel `index[j]` of `module` scales input column j of a stage.

    module: its name in the model. linear: whether it is a linear map (scale its rows) or a norm (scale its gain).
    """

    module: str
    linear: bool
    index: Int[Tensor, " in"]

    @property
    def shared(self) -> bool:
        """Whether one channel makes several columns."""
        return len(self.index.unique()) < len(self.index)

    def channels(self, columns: Float[Tensor, " in"]) -> Float[Tensor, " channels"] | None:
        """Scales of the columns as scales of the channels; None where one channel would need two."""
        result = columns.new_ones(int(self.index.max()) + 1).index_copy(0, self.index, columns)
        return result if torch.equal(result[self.index], columns) else None


@torch.no_grad()
def find_folds(
    model: nn.Module, blocks: tuple[Block, ...], probe: Int[Tensor, "n length"], pages: Pages = UNMAPPED
) -> dict[str, Fold]:
    """A fold for every stage that has one, by stage name. blocks: the repeated ones, all of them.

    probe: any short batch of valid tokens, which says how the model calls its blocks. What enters them is drawn: the
    embeddings of a quantized model may have columns of zeros. What was found in one block is tried first in the next.
    """
    stream = open_stream(model, probe, pages=pages)
    size = stream.batches[0].square().mean().sqrt().clamp_min(1e-3)
    drawn = torch.randn(stream.batches[0].shape, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(size.device) * size
    found: dict[str, Fold] = {}
    pattern: dict[str, tuple[str, Fold]] = {}
    for block, call in zip(blocks, stream.calls):
        work = copy.deepcopy(model.get_submodule(block.name)).float()
        call = BlockCall(_float(call.args), _float(call.kwargs))
        for stage in block.stages:
            place = stage.name.removeprefix(f"{block.name}.")
            guess = pattern.get(place)
            fold = None
            if guess is not None:
                fold = replace(guess[1], module=f"{block.name}.{guess[0]}")
                fold = fold if _same(work, block, stage, fold, call, hidden) else None
            fold = fold or _search(work, block, stage, call, hidden)
            if fold is not None:
                found[stage.name] = fold
                pattern[place] = (fold.module.removeprefix(f"{block.name}."), fold)
        pages.release(model.get_submodule(block.name).parameters())
    return found


def _float(value: object) -> object:
    """Everything floating in float32."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_float(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _float(item) for key, item in value.items()}
    return value


def _search(work: nn.Module, block: Block, stage: Stage, call: BlockCall, hidden: Tensor) -> Fold | None:
    """The first module of the block that the stage's columns follow, and that changes nothing else."""
    plain = _input(work, block, stage, call, hidden)
    own = {site.name for site in stage.sites}
    for name, module in work.named_modules():
        full = f"{block.name}.{name}"
        channels = _channels(module)
        if channels is None or full in own:
            continue
        # Two digits say which channel it is, each coarse enough for float32.
        base = int(channels**0.5) + 1
        numbers = torch.arange(channels, device=hidden.device)
        index = None
        for digit in (numbers // base, numbers % base):
            marked = _input(work, block, stage, call, hidden, name, 1.0 + digit / base)
            read = _read(plain, marked, base)
            index = read if index is None or read is None else base * index + read
            if read is None:
                index = None
                break
        if index is None or int(index.max()) >= channels:
            continue
        fold = Fold(full, is_linear(module), index.cpu())
        if _same(work, block, stage, fold, call, hidden):
            return fold
    return None


def _channels(module: nn.Module) -> int | None:
    """Output channels of a linear map or of a norm; None for anything else."""
    weight = getattr(module, "weight", None)
    if is_linear(module):
        return site_shape(module)[0]
    return weight.numel() if isinstance(weight, Tensor) and weight.ndim == 1 else None


def _read(plain: Float[Tensor, "tokens in"], marked: Float[Tensor, "tokens in"], base: int) -> Tensor | None:
    """The digit that each column shows, if all tokens agree."""
    if plain.shape != marked.shape or not plain.numel():  # a site that this batch does not reach
        return None
    strongest = plain.abs().argmax(0, keepdim=True)
    ratio = (marked.gather(0, strongest) / plain.gather(0, strongest))[0]
    digit = torch.round((ratio - 1.0) * base)
    expected = plain * (1.0 + digit / base)
    size = plain.square().mean().sqrt()
    if not ((digit >= 0) & (digit <= base)).all() or not ((marked - expected).abs() <= TOLERANCE * size).all():
        return None
    return digit.long()


def _input(
    work: nn.Module,
    block: Block,
    stage: Stage,
    call: BlockCall,
    hidden: Tensor,
    scaled: str | None = None,
    scale: Tensor | None = None,
) -> Float[Tensor, "tokens in"]:
    """What the stage reads when the output of `scaled` is multiplied by `scale`."""
    seen: list[Tensor] = []
    site = work.get_submodule(stage.name.removeprefix(f"{block.name}."))
    handles = [site.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))]
    if scaled is not None:
        handles.append(_scaling(work.get_submodule(scaled), scale))
    with hooks(handles):
        run_block(work, call, hidden)
    return seen[0] if seen else hidden.new_zeros(0, stage.columns)


def _scaling(module: nn.Module, scale: Tensor) -> object:
    return module.register_forward_hook(lambda _, __, output: output * scale)


def _same(work: nn.Module, block: Block, stage: Stage, fold: Fold, call: BlockCall, hidden: Tensor) -> bool:
    """Whether the block computes the same with random scales folded: nobody else reads what they change."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(int(fold.index.max()) + 1, generator=generator)).to(hidden.device)
    columns = scale[fold.index.to(hidden.device)]
    module = work.get_submodule(fold.module.removeprefix(f"{block.name}."))
    if _channels(module) != len(scale) or len(columns) != stage.columns:
        return False
    expected = run_block(work, call, hidden)
    handles = [_scaling(module, scale)]
    for site in stage.sites:
        inside = work.get_submodule(site.name.removeprefix(f"{block.name}."))
        handles.append(inside.register_forward_pre_hook(lambda _, args: (args[0] / columns, *args[1:])))
    with hooks(handles):
        result = run_block(work, call, hidden)
    return bool((result - expected).norm() <= TOLERANCE * (expected - hidden).norm())


@torch.no_grad()
def scaled_parameters(
    module: nn.Module, name: str, scale: Float[Tensor, " channels"]
) -> dict[str, Float[Tensor, "*any"]]:
    """Parameters of a norm (of a linear map, its bias) whose outputs are to be multiplied by `scale`: float32, by name.

    Norms multiply with their weight or, like Gemma's, with one more than it: which of the two is tried out. Raises
    ValueError where neither does it.
    """
    scale = scale.float().cpu()
    parts = {part: parameter.detach().float().cpu() for part, parameter in module.named_parameters(recurse=False)}
    bias = {f"{name}.bias": parts["bias"] * scale} if "bias" in parts else {}
    if is_linear(module):
        return bias
    probe = torch.randn(4, len(scale), generator=torch.Generator().manual_seed(0))
    norm = copy.deepcopy(module).float().cpu()
    expected = norm(probe) * scale
    for weight in (parts["weight"] * scale, (1.0 + parts["weight"]) * scale - 1.0):
        norm.weight.copy_(weight)
        if bias:
            norm.bias.copy_(bias[f"{name}.bias"])
        if (norm(probe) - expected).abs().max() <= 1e-4 * expected.abs().max():
            return {f"{name}.weight": weight, **bias}
    raise ValueError(f"{name} does not multiply with its weight")

"""Models whose weights were changed everywhere in the same way: the baselines that a control has to beat.

Written as ordinary model folders, one tensor at a time beyond what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.export.weights import chosen_dtype, untouched, write_shards, write_side_files
from geoquant.lattice.grid import Grid, search_scales
from geoquant.model.load import Loaded, load
from geoquant.model.walk import site_modules
from geoquant.plan.points import Change
from geoquant.privacy.anchor import anchored
from geoquant.runs import atomic_directory

__all__ = ["noised", "steps", "write_variant"]

GRID = Grid(4, 64, True)  # whose steps are the unit of noise


def write_variant(folder: Path, model: str, base: str | None, change: Change, *, seed: int = 0) -> None:
    """The changed model in `folder`, in the type it is stored in. The same seed gives the same bits.

    Raises UserError where the base has other weights.
    """
    loaded = load(model)
    dtype = chosen_dtype(loaded.model, None)
    if change.kind == "interpolate":
        tensors = _between(loaded, load(str(base)), change.amount, dtype)
    else:
        tensors = _noisy(loaded, change.amount, seed, dtype)
    with atomic_directory(folder) as partial, torch.no_grad():
        write_shards(partial, tensors)
        write_side_files(partial, loaded.model, loaded.tokenizer, dtype)


def _between(loaded: Loaded, base: Loaded, share: float, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, with this share of its change from the base."""
    theirs = dict(untouched(base.model, (), dtype))
    for name, own in untouched(loaded.model, (), dtype):
        if name not in theirs or theirs[name].shape != own.shape:
            raise UserError(
                f"the base {base.name} is no base of {loaded.name}: its {name} is another",
                fix="give the model that it was fine-tuned from",
            )
        yield name, anchored(own, theirs[name], share) if own.is_floating_point() else own


def _noisy(loaded: Loaded, amount: float, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, those of linear layers with noise on them."""
    linear = {f"{name}.weight": module for name, module in site_modules(loaded.model).items()}
    generator = torch.Generator().manual_seed(seed)
    for name, own in untouched(loaded.model, (), dtype):
        if (module := linear.get(name)) is None:
            yield name, own
        elif isinstance(module, nn.Linear):
            yield name, noised(own, amount, generator).to(own.dtype)
        else:  # stored the other way round
            yield name, noised(own.T, amount, generator).T.to(own.dtype)


def noised(weight: Float[Tensor, "out in"], amount: float, generator: torch.Generator) -> Float[Tensor, "out in"]:
    """`weight + amount * step * N(0, 1)`, independent, `step` that of the weight's group (`steps`)."""
    wide = weight.float().cpu()
    return (wide + amount * steps(wide) * torch.randn(wide.shape, generator=generator)).to(weight.device)


def steps(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The step that every weight has on a symmetric 4-bit grid with groups of 64 columns, searched as for rounding."""
    parts = []
    for group in weight.split(GRID.group_size, dim=1):
        scale, _ = search_scales(group.T.contiguous(), torch.ones(group.shape[1]), GRID)
        parts.append(scale.abs().float()[:, None].expand(-1, group.shape[1]))
    return torch.cat(parts, dim=1)

"""What can be done to a part of a site's weights to learn what that part is for.

    quantize@b   round to b bits: nearest codes, steps by squared error over 64 neighbouring columns of a row
    zero         remove
    noise@rho    add Gaussian noise of standard deviation rho times the part's root mean square, seeded
    revert       put back what the public base has there
    clip@q       cut off what is larger than the q-quantile of the whole site's |w|

Pure functions from weight to changed weight; what they do to a model is measured in effects.py. What is not of the part
never changes. Steps and quantiles are those of the whole site, so that a part is changed as it would be if the site
were changed, and the changes of parts that share no weight add up to the site's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geoquant.errors import UserError, unknown_name
from geoquant.lattice.grid import Grid, round_to_grid, search_scales

__all__ = ["KINDS", "Intervention", "Part", "block_of_columns", "intervene", "largest", "parse", "rounded"]

GROUP = 64


@dataclass(frozen=True, eq=False)
class Part:
    """Weights of one site that are changed together: some input columns, some weights, or with neither all of them.

    site: name in `model.named_modules()`. columns: (n,) indices. weights: (n,) flat indices into the (out, in) weight,
    or an (out, in) mask. label: what a person calls the part.
    """

    site: str
    columns: Int[Tensor, " n"] | None = None
    weights: Int[Tensor, " n"] | Bool[Tensor, "out in"] | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.columns is not None and self.weights is not None:
            raise ValueError("a part is made of columns or of weights, but got both")

    @property
    def name(self) -> str:
        """The site, and what of it."""
        if self.label:
            return f"{self.site} {self.label}"
        return self.site if self.columns is None and self.weights is None else f"{self.site} (part)"

    def mask(self, shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """Which weights of an (out, in) matrix belong to the part.

        Raises ValueError for a part that is empty or not within the matrix.
        """
        out, columns = shape
        if self.weights is not None and self.weights.dtype == torch.bool:
            if tuple(self.weights.shape) != tuple(shape):
                raise ValueError(f"a mask of shape {tuple(self.weights.shape)} for weights of shape {tuple(shape)}")
            found = self.weights.cpu()
        elif self.weights is not None:
            found = _marked(self.weights, out * columns).view(out, columns)
        elif self.columns is not None:
            found = _marked(self.columns, columns).expand(out, columns)
        else:
            found = torch.ones(out, columns, dtype=torch.bool)
        if not found.any():
            raise ValueError(f"{self.name} holds no weight")
        return found


def _marked(indices: Int[Tensor, " n"], count: int) -> Bool[Tensor, " count"]:
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(f"indices from {int(indices.min())} to {int(indices.max())}, wanted within 0..{count - 1}")
    found = torch.zeros(count, dtype=torch.bool)
    found[indices.cpu()] = True
    return found


def block_of_columns(site: str, start: int, stop: int) -> Part:
    """The neighbouring input columns start to stop - 1."""
    return Part(site, columns=torch.arange(start, stop), label=f"columns {start}..{stop - 1}")


def largest(site: str, scores: Float[Tensor, "out in"] | Float[Tensor, " in"], share: float, label: str = "") -> Part:
    """The `share` of the weights (or columns, for one score each) with the largest scores; at least one."""
    count = max(1, round(share * scores.numel()))
    chosen = scores.flatten().topk(count).indices.sort().values
    label = label or f"top {100 * share:g}%"
    return Part(site, columns=chosen, label=label) if scores.ndim == 1 else Part(site, weights=chosen, label=label)


@dataclass(frozen=True)
class Intervention:
    """What is done: a name of KINDS, its value where it takes one, and the seed of its noise."""

    kind: str
    value: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("intervention", self.kind, KINDS)
        kind = KINDS[self.kind]
        if (self.value is None) != (kind.wanted is None) or (
            self.value is not None and not kind.allowed(float(self.value))
        ):
            got = "no value" if self.value is None else f"{self.value:g}"
            fix = f"write {kind.example}"
            raise UserError(f"the intervention {self.kind!r} takes {kind.wanted or 'no value'}", got=got, fix=fix)

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}@{self.value!r}".removesuffix(".0")


def parse(text: str, seed: int = 0) -> Intervention:
    """An intervention from its name: "quantize@3", "zero", "noise@0.1", "revert", "clip@0.999".

    Raises UserError for an unknown name and for a value that is missing, not wanted, or out of range.
    """
    kind, at, value = text.strip().partition("@")
    if kind not in KINDS:
        raise unknown_name("intervention", kind, KINDS)
    try:
        return Intervention(kind, float(value) if at else None, seed)
    except ValueError:
        wanted = KINDS[kind].wanted or "no value"
        raise UserError(f"cannot read the intervention {text!r}", wanted=f"{KINDS[kind].example} ({wanted})") from None


def intervene(
    weight: Float[Tensor, "out in"],
    part: Part,
    intervention: Intervention,
    base: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weight (float32) after the intervention on `part`; `weight` itself stays as it is.

    base: the public base's weight, for `revert`. Raises UserError where that is missing and ValueError where it has
    another shape.
    """
    if intervention.kind == "revert":
        if base is None:
            raise UserError("the intervention 'revert' needs a base model", fix="give the public base with --base")
        if base.shape != weight.shape:
            raise ValueError(f"a base weight of shape {tuple(base.shape)} for one of shape {tuple(weight.shape)}")
    mask = part.mask(tuple(weight.shape)).to(weight.device)
    # Each site has noise of its own, and none that somebody else draws from the same small seed.
    own = hashlib.sha256(f"{part.site} {intervention.seed}".encode()).digest()
    given = _Given(mask, intervention.value, base, int.from_bytes(own[:7], "big"))
    return torch.where(mask, KINDS[intervention.kind].change(weight.float(), given), weight.float())


@dataclass(frozen=True, eq=False)
class _Given:
    """What a function of KINDS gets beside the weight: mask of the part, value, the base's weight, seed."""

    mask: Bool[Tensor, "out in"]
    value: float | None
    base: Float[Tensor, "out in"] | None
    seed: int


def _quantize(weight: Tensor, given: _Given) -> Tensor:
    return rounded(weight, int(given.value))


def rounded(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """The nearest symmetric codes of groups of 64, every column as important as any other."""
    grid = Grid(bits=bits, group_size=GROUP)
    found = []
    for group in weight.T.contiguous().split(GROUP):
        scale, zero = search_scales(group, torch.ones(len(group), device=group.device), grid)
        found.append(round_to_grid(group, scale, zero, grid)[0] * scale)
    return torch.cat(found).T.contiguous()


def _zero(weight: Tensor, given: _Given) -> Tensor:
    return torch.zeros_like(weight)


def _noise(weight: Tensor, given: _Given) -> Tensor:
    size = weight[given.mask].square().mean().sqrt() * given.value
    # Drawn on the CPU: the same seed means the same noise on every device.
    generator = torch.Generator().manual_seed(given.seed)
    return weight + size * torch.randn(weight.shape, generator=generator).to(weight.device)


def _revert(weight: Tensor, given: _Given) -> Tensor:
    return given.base.to(weight.device, weight.dtype)


def _clip(weight: Tensor, given: _Given) -> Tensor:
    sizes = weight.abs().flatten()
    limit = sizes.kthvalue(max(1, math.ceil(given.value * len(sizes)))).values
    return weight.clamp(-limit, limit)


@dataclass(frozen=True)
class Kind:
    """change: the function. wanted: which values it takes, in words; None for none. example: as a person writes it."""

    change: Callable[[Tensor, _Given], Tensor]
    example: str
    wanted: str | None = None
    allowed: Callable[[float], bool] = lambda value: False


KINDS: dict[str, Kind] = {
    "quantize": Kind(
        _quantize, "quantize@3", "a whole number of bits from 2 to 8", lambda v: v.is_integer() and 2 <= v <= 8
    ),
    "zero": Kind(_zero, "zero"),
    "noise": Kind(_noise, "noise@0.1", "a share of the part's RMS above 0", lambda v: 0 < v < math.inf),
    "revert": Kind(_revert, "revert"),
    "clip": Kind(_clip, "clip@0.999", "a quantile between 0 and 1", lambda v: 0 < v < 1),
}

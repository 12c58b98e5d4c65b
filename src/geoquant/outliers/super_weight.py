"""Super weights: the one weight behind a massive activation, found by its product and tried by zeroing it.

A site that writes to the residual stream makes coordinate i of a token as `sum_j W_ij x_j`; the weight of the largest
term is the suspect. Its effect is the increase of the loss when it alone is zero, paired by window. The nulls: weights
of about the same size in the same matrix, zeroed one at a time, and many random ones at once.

Yu et al.: The super weight in large language models, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.model.walk import Block, read_weight, write_weight
from geoquant.observe.stream import BlockCall, run_block

__all__ = [
    "Effect",
    "SuperWeight",
    "SuperWeights",
    "candidates",
    "effect",
    "largest_term",
    "like_sized",
    "random_places",
    "zeroed",
]

Place = tuple[int, int]  # row, column


def largest_term(row: Float[Tensor, " in"], x: Float[Tensor, " in"]) -> tuple[int, float]:
    """Column and value of the largest `|w_j x_j|`, the value with its sign."""
    terms = row * x
    column = int(terms.abs().argmax())
    return column, terms[column].item()


def like_sized(weight: Float[Tensor, "out in"], place: Place, count: int) -> list[Place]:
    """The `count` other weights whose sizes are nearest to that of the one at `place`, the nearest first."""
    distance = (weight.abs() - weight[place].abs()).abs()
    distance[place] = torch.inf
    nearest = distance.flatten().topk(min(count, weight.numel() - 1), largest=False).indices
    return [divmod(index, weight.shape[1]) for index in nearest.tolist()]


def random_places(weight: Float[Tensor, "out in"], place: Place, count: int, generator: torch.Generator) -> list[Place]:
    """`count` different weights drawn at random, never the one at `place`."""
    own = place[0] * weight.shape[1] + place[1]
    drawn = torch.randperm(weight.numel() - 1, generator=generator)[:count]
    return [divmod(index + (index >= own), weight.shape[1]) for index in drawn.tolist()]


@contextmanager
def zeroed(module: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """Inside, these weights of a linear map are zero; afterwards the very memory of before is back."""
    before = module.weight.data
    weight = read_weight(module)
    for place in places:
        weight[place] = 0.0
    write_weight(module, weight)
    try:
        yield
    finally:
        module.weight.data = before


@dataclass(frozen=True)
class Effect:
    """Increase of the mean loss per token in nats, its standard error over windows (None for one), and by window."""

    delta: float
    error: float | None
    windows: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Beyond two standard errors. Of four windows that is a t statistic of three degrees of freedom: p = 0.07."""
        return self.error is not None and self.delta > 2 * self.error


def effect(before: Float[Tensor, " windows"], after: Float[Tensor, " windows"]) -> Effect:
    """From each window's mean loss before and after."""
    change = (after - before).double()
    error = change.std().item() / len(change) ** 0.5 if len(change) > 1 else None
    return Effect(change.mean().item(), error, tuple(change.tolist()))


UNTRIED = Effect(0.0, None, ())


@dataclass(frozen=True)
class SuperWeight:
    """The weight behind one massive coordinate.

    block, dimension, window, position: where that was born. site, row, column: the weight. weight, input: the two
    factors. share: of their product in what the site writes there. removed: of the coordinate after
    the block, what is gone without the weight. rank: place of |weight| in its matrix, the largest first.
    zeroing: its effect.
    like_sized: effects of weights of its size, one at a time. random, many: effect of `many` random ones at once.
    """

    block: int
    dimension: int
    window: int
    position: int
    site: str
    row: int
    column: int
    weight: float
    input: float
    share: float
    removed: float
    rank: int
    zeroing: Effect
    like_sized: tuple[Effect, ...]
    random: Effect
    many: int

    @property
    def confirmed(self) -> bool:
        """Zeroing it costs something, and more than each of the nulls does."""
        nulls = [*self.like_sized, self.random]
        return self.zeroing.clear and all(self.zeroing.delta > null.delta for null in nulls)


def candidates(
    work: nn.Module,
    block: Block,
    call: BlockCall,
    hidden: Sequence[Tensor],
    after: Sequence[Tensor],
    inputs: dict[str, Tensor],
    place: tuple[int, int, int],
) -> Iterator[SuperWeight]:
    """Of every site that writes to the residual stream, the weight of the largest term, and what it removes there.

    Only sites that read every token can be told which row is the token's. hidden, after: what enters and leaves the
    block. inputs: of its stages, (tokens, in). place: window, position, dimension of a coordinate that is not zero.
    """
    window, position, dimension = place
    size, length, width = after[0].shape
    batch, row = divmod(window, size)
    new = after[batch][row, position, dimension].item()
    for stage in block.stages:
        seen = inputs.get(stage.name)
        for site in stage.sites:
            if seen is None or len(seen) != len(after) * size * length:
                continue
            if site.shape[0] != width or site.kind.endswith("_in"):
                continue
            module = work.get_submodule(site.name.removeprefix(f"{block.name}."))
            weight, x = read_weight(module), seen[window * length + position]
            column, term = largest_term(weight[dimension], x)
            written = (weight[dimension] @ x).item() + (0.0 if module.bias is None else module.bias[dimension].item())
            with zeroed(module, [(dimension, column)]):
                left = run_block(work, call, hidden[batch].clone())[row, position, dimension].item()
            yield SuperWeight(
                block=block.index,
                dimension=dimension,
                window=window,
                position=position,
                site=site.name,
                row=dimension,
                column=column,
                weight=weight[dimension, column].item(),
                input=x[column].item(),
                share=term / written if written else 0.0,
                removed=1 - left / new,
                rank=int((weight.abs() > weight[dimension, column].abs()).sum()) + 1,
                zeroing=UNTRIED,
                like_sized=(),
                random=UNTRIED,
                many=0,
            )


@dataclass(frozen=True)
class SuperWeights:
    """Those behind the births that could be traced, in the order of the blocks."""

    found: tuple[SuperWeight, ...]

    def to_dict(self) -> dict:
        return {"found": [asdict(weight) | {"confirmed": weight.confirmed} for weight in self.found]}

    def finding(self) -> str:
        if not self.found:
            return "Super weights: no massive activation could be traced to a weight."
        most = max(self.found, key=lambda weight: weight.zeroing.delta)
        number = sum(weight.confirmed for weight in self.found)
        nulls = max(null.delta for null in (*most.like_sized, most.random))
        error = "" if most.zeroing.error is None else f" +- {most.zeroing.error:.3f}"
        return (
            f"Super weights: {number} of {len(self.found)} suspects confirmed; zeroing [{most.row}, {most.column}] of "
            f"{most.site} ({most.weight:.3g}, the {_ordinal(most.rank)} largest of its matrix, {most.share:.0%} of "
            f"what it writes to dimension {most.dimension}) changes the loss by {most.zeroing.delta:+.3f}{error} nats; "
            f"weights of its size, or {most.many} random ones at once, by at most {nulls:+.3f}."
        )


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"

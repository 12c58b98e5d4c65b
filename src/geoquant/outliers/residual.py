"""Massive activations along the residual stream: where they are born, live and die.

Sun et al.: Massive activations in large language models, COLM 2024, call an activation massive above 100 and 1,000
times the median; only the second half of that is free of units, and used here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["MASSIVE", "Boundary", "Life", "Residuals", "boundary", "cosines", "lives", "summarise_residuals"]

MASSIVE = 1000.0  # times the median |h|


@dataclass(frozen=True)
class Boundary:
    """The residual stream before the first block, or after one.

    typical: median |h|. peaks, places: of each window and dimension the largest |h| and the position that has it.
    count: how many numbers there were.
    """

    typical: float
    peaks: Float[Tensor, "windows hidden"]
    places: Int[Tensor, "windows hidden"]
    count: int

    @property
    def ratios(self) -> Float[Tensor, " hidden"]:
        """Of each dimension the largest |h| over the median."""
        return self.peaks.amax(0) / max(self.typical, 1e-30)

    @property
    def largest(self) -> tuple[float, int, int, int]:
        """|h|, window, position, dimension."""
        window, dimension = divmod(int(self.peaks.argmax()), self.peaks.shape[1])
        return self.peaks.max().item(), window, int(self.places[window, dimension]), dimension


def boundary(hidden: Sequence[Float[Tensor, "b length hidden"]]) -> Boundary:
    """What there is to know of all windows."""
    sizes = [part.abs() for part in hidden]
    found = [part.max(dim=1) for part in sizes]
    return Boundary(
        typical=torch.cat([part.flatten() for part in sizes]).median().item(),
        peaks=torch.cat([part.values for part in found]).cpu(),
        places=torch.cat([part.indices for part in found]).cpu(),
        count=sum(part.numel() for part in sizes),
    )


def cosines(
    before: Sequence[Float[Tensor, "b length hidden"]], after: Sequence[Float[Tensor, "b length hidden"]]
) -> Float[Tensor, "windows length"]:
    """Cosine of every token's residual with that of the boundary before."""
    return torch.cat([torch.cosine_similarity(x, y, dim=-1) for x, y in zip(before, after, strict=True)]).cpu()


@dataclass(frozen=True)
class Life:
    """One dimension, from the block that makes it massive to the one that ends it.

    born:  block, -1 for the embeddings. died: block after which it is massive no more, None where it outlives them all.
    peak:  largest |h|; ratio: over the median there; block: after which. position: where in its windows, the commonest.
    windows: share of the windows in which it is massive at its peak.
    lasted: share of the boundaries from its birth to the end. kept: |h| where it was last massive, over the peak.
    """

    dimension: int
    born: int
    died: int | None
    peak: float
    ratio: float
    block: int
    position: int
    windows: float
    lasted: float
    kept: float


def lives(boundaries: Sequence[Boundary], threshold: float = MASSIVE) -> tuple[Life, ...]:
    """All lives of all dimensions, the largest first. Boundary 0 is before block 0."""
    alive = torch.stack([part.ratios >= threshold for part in boundaries])
    found = []
    for dimension in alive.any(0).nonzero().flatten().tolist():
        start = None
        for index in range(len(boundaries) + 1):
            lives_on = index < len(boundaries) and bool(alive[index, dimension])
            if lives_on and start is None:
                start = index
            elif not lives_on and start is not None:
                found.append(_life(boundaries, dimension, start, index - 1, threshold))
                start = None
    return tuple(sorted(found, key=lambda life: -life.peak))


def _life(boundaries: Sequence[Boundary], dimension: int, start: int, end: int, threshold: float) -> Life:
    sizes = [part.peaks[:, dimension].max().item() for part in boundaries[start : end + 1]]
    peak = max(range(len(sizes)), key=sizes.__getitem__)
    at = boundaries[start + peak]
    massive = at.peaks[:, dimension] >= threshold * at.typical
    places = at.places[massive, dimension].tolist()
    return Life(
        dimension=dimension,
        born=start - 1,
        died=None if end == len(boundaries) - 1 else end,
        peak=sizes[peak],
        ratio=sizes[peak] / max(at.typical, 1e-30),
        block=start + peak - 1,
        position=Counter(places).most_common(1)[0][0],
        windows=massive.float().mean().item(),
        lasted=len(sizes) / (len(boundaries) - start),
        kept=sizes[-1] / sizes[peak],
    )


@dataclass(frozen=True)
class Residuals:
    """The residual stream at every boundary, and of every block what it leaves of it.

    largest, typical: largest and median |h|; position, dimension: of the largest. lives: see `Life`.
    massive_cosine, ordinary_cosine: median cosine of a block's output with its input, over the positions that hold a
    massive activation in some block (None without any), and over all others.
    gaussian: the null of largest / typical, for normal numbers. threshold: from which ratio on one is massive.
    """

    largest: tuple[float, ...]
    typical: tuple[float, ...]
    position: tuple[int, ...]
    dimension: tuple[int, ...]
    lives: tuple[Life, ...]
    massive_cosine: tuple[float | None, ...]
    ordinary_cosine: tuple[float, ...]
    gaussian: float
    threshold: float

    def to_dict(self) -> dict:
        return asdict(self)

    def finding(self) -> str:
        ratios = [a / max(b, 1e-30) for a, b in zip(self.largest, self.typical)]
        top = max(range(len(ratios)), key=ratios.__getitem__)
        if not self.lives:
            return (
                f"Residual stream: no massive activation; the largest number is {ratios[top]:.0f} times the median "
                f"({_after(top - 1)}, dimension {self.dimension[top]}; normal numbers: {self.gaussian:.0f}, massive "
                f"from {self.threshold:.0f})."
            )
        life = self.lives[0]
        other = len(self.lives) - 1
        end = "lives to the end" if life.died is None else f"dies in block {life.died}"
        born = "is in the embeddings" if life.born < 0 else f"is born in block {life.born}"
        text = (
            f"Residual stream: dimension {life.dimension} {born} at position {life.position} in {life.windows:.0%} of "
            f"the windows, reaches {life.peak:,.0f} ({life.ratio:,.0f} times the median; normal numbers: "
            f"{self.gaussian:.0f}) and {end}, massive at {life.lasted:.0%} of the boundaries from there on"
        )
        inside = [x for x in self.massive_cosine[life.born + 1 : life.died] if x is not None]
        around = self.ordinary_cosine[life.born + 1 : life.died]
        if inside:
            text += (
                f"; while it lives, a block leaves its token at cosine {_middle(inside):.4f} with what it was, the "
                f"other tokens at {_middle(around):.3f}"
            )
        return text + (f"; {other} more lives" if other > 1 else "; 1 more life" if other else "") + "."


def summarise_residuals(
    boundaries: Sequence[Boundary], turns: Sequence[Float[Tensor, "windows length"]], threshold: float = MASSIVE
) -> Residuals:
    """Of all boundaries and, between each two, the cosines."""
    found = lives(boundaries, threshold)
    tops = [part.largest for part in boundaries]
    held = torch.zeros(turns[0].shape, dtype=torch.bool)
    for life in found:
        at = boundaries[life.block + 1]
        for window in (at.peaks[:, life.dimension] >= threshold * at.typical).nonzero().flatten().tolist():
            held[window, at.places[window, life.dimension]] = True
    return Residuals(
        largest=tuple(top[0] for top in tops),
        typical=tuple(part.typical for part in boundaries),
        position=tuple(top[2] for top in tops),
        dimension=tuple(top[3] for top in tops),
        lives=found,
        massive_cosine=tuple(turn[held].median().item() if held.any() else None for turn in turns),
        ordinary_cosine=tuple(turn[~held].median().item() for turn in turns),
        gaussian=_gaussian(boundaries[0].count),
        threshold=threshold,
    )


def _gaussian(count: int) -> float:
    """Expected largest of `count` normal |h| over their median, by Blom's formula."""
    level = (count - 0.375) / (count + 0.25)
    normal = torch.distributions.Normal(0.0, 1.0)
    largest = normal.icdf(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
    return largest / (math.sqrt(2) * torch.special.erfinv(torch.tensor(0.5)).item())


def _after(block: int) -> str:
    return "in the embeddings" if block < 0 else f"after block {block}"


def _middle(values: Sequence[float]) -> float:
    return torch.tensor(values).median().item()

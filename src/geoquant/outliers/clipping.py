"""Clip or round: where the error of one scale comes from, and which clip is best.

A group of weights with largest size m, cut at c m and rounded to b bits on the grid `s z`, `s = c m / (2^(b-1) - 1)`,
`|z| <= 2^(b-1) - 1`, loses

    sum over |w| > c m of (|w| - c m)^2   +   sum over the others of (w - s round(w / s))^2

The first term falls with c, the second one rises. All sums run over all weights, nothing is binned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.clip_kernel import add_splits

__all__ = ["CLIPS", "ClipCurve", "ClipSplit", "Clipping", "clip_curve", "clip_split"]

CLIPS = tuple(0.25 + 0.05 * step for step in range(16))  # the last one clips nothing


@dataclass(frozen=True)
class ClipCurve:
    """Of every clip, sums over the rows of one matrix, the errors by input column.

    clipped, rounded: the two terms. beyond: how many weights were cut. energy: `sum_i w_ij^2`. rows: how many.
    """

    clips: tuple[float, ...]
    clipped: Float[Tensor, "clips in"]
    rounded: Float[Tensor, "clips in"]
    beyond: Float[Tensor, " clips"]
    energy: Float[Tensor, " in"]
    rows: int


@dataclass(frozen=True)
class ClipSplit:
    """One matrix with one scale per row and `size` neighbouring columns (None: per row).

    clip, clipped, rounded: relative errors at each clip. best: the clip of the least error, the same for every group.
    best_weighted: the same with every column's error weighted by the energy of its input. error: the least relative
    error. unclipped: that of the largest clip. beyond: share of the weights cut at the best clip. share: clipping's
    part of the least error.
    """

    site: str
    kind: str
    size: int | None
    clip: tuple[float, ...]
    clipped: tuple[float, ...]
    rounded: tuple[float, ...]
    best: float
    best_weighted: float
    error: float
    unclipped: float
    beyond: float
    share: float

    @property
    def gain(self) -> float:
        """Part of the unclipped error that the best clip saves."""
        return 1 - self.error / max(self.unclipped, 1e-30)


def clip_curve(
    weight: Float[Tensor, "out in"], bits: int, size: int | None, clips: Sequence[float] = CLIPS
) -> ClipCurve:
    """The exact split at every clip.

    Raises ValueError where the grid would have no level beside zero.
    """
    if bits < 2:
        raise ValueError(f"a symmetric grid needs 2 bits, got {bits}")
    rows, columns = weight.shape
    size = columns if size is None else size
    highest = float(2 ** (bits - 1) - 1)
    clipped, rounded = (torch.zeros(len(clips), columns, dtype=torch.float64) for _ in range(2))
    beyond = torch.zeros(len(clips), dtype=torch.float64)
    given = weight.detach().float().cpu().contiguous().numpy()
    tried = np.array(clips, dtype=np.float32)
    for start in range(0, columns, size):
        part = slice(start, min(start + size, columns))
        sums = (clipped[:, part].numpy(), rounded[:, part].numpy(), beyond.numpy())
        add_splits(given[:, part], tried, np.float32(highest), *sums)
    return ClipCurve(tuple(clips), clipped, rounded, beyond, weight.cpu().double().square().sum(0), rows)


def clip_split(site: str, kind: str, size: int | None, curve: ClipCurve, inputs: Float[Tensor, " in"]) -> ClipSplit:
    """What a curve says. inputs: mean square of every input column."""
    clipped, rounded = curve.clipped.sum(1), curve.rounded.sum(1)
    energy = curve.energy.sum().clamp_min(1e-30)
    total = clipped + rounded
    at = int(total.argmin())
    weighted = (curve.clipped + curve.rounded) @ inputs.to(curve.energy)
    return ClipSplit(
        site=site,
        kind=kind,
        size=size,
        clip=curve.clips,
        clipped=tuple((clipped / energy).tolist()),
        rounded=tuple((rounded / energy).tolist()),
        best=curve.clips[at],
        best_weighted=curve.clips[int(weighted.argmin())],
        error=(total[at] / energy).item(),
        unclipped=(total[-1] / energy).item(),
        beyond=(curve.beyond[at] / (curve.rows * len(curve.energy))).item(),
        share=(clipped[at] / total[at].clamp_min(1e-30)).item(),
    )


@dataclass(frozen=True)
class Clipping:
    """Splits of all sites at `bits` bits; `gaussian` of normal weights, the null, by size of the group."""

    bits: int
    splits: tuple[ClipSplit, ...]
    gaussian: tuple[ClipSplit, ...]

    def worst(self) -> tuple[ClipSplit, ...]:
        """Of each kind of site and size of group the one that loses most without a clip."""
        found: dict[tuple, ClipSplit] = {}
        for split in self.splits:
            key = split.kind, split.size
            if key not in found or split.unclipped > found[key].unclipped:
                found[key] = split
        return tuple(found.values())

    def to_dict(self) -> dict:
        """Every site's figures, and the curves of the worst ones and of the nulls."""
        curves = [vars(split) for split in (*self.worst(), *self.gaussian)]
        long = ("clip", "clipped", "rounded")
        sites = [{k: v for k, v in vars(x).items() if k not in long} | {"gain": x.gain} for x in self.splits]
        return {"bits": self.bits, "sites": sites, "curves": curves}

    def finding(self) -> str:
        if not self.splits:
            return "Clipping: no site was measured."
        parts = []
        for null in self.gaussian:
            own = [split for split in self.splits if split.size == null.size]
            most = max(own, key=lambda split: split.gain)
            higher, lower = (sum(sign * (x.best_weighted - x.best) > 0 for x in own) for sign in (1, -1))
            best = torch.tensor([split.best for split in own]).median().item()
            parts.append(
                f"one scale per {'row' if null.size is None else f'{null.size} weights'}: best at {best:.2f} of the "
                f"largest weight (median; normal weights {null.best:.2f}), which saves up to {most.gain:.0%} of the "
                f"error ({most.site}; normal weights {null.gain:.0%}); weighted by the inputs, it is higher at "
                f"{higher} and lower at {lower} of {len(own)} sites"
            )
        return f"Clipping at {self.bits} bits, {'; '.join(parts)}."

"""What a score is, and how it is read per weight, column, row, group and site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import Null, SiteContext, null_contexts

__all__ = ["GROUP", "Score", "columns", "groups", "rows", "site"]

GROUP = 64  # neighbouring input columns


@dataclass(frozen=True)
class Score:
    """One number per weight, input column, output row or site.

    name:    as it is called everywhere. title: half a sentence for a person. unit: of the numbers, or "".
    axis:    what `compute` returns one number for: `weight` (out, in), `column` (in,), `row` (out,) or `site` ().
    combine: how numbers become one for a larger part: `sum` for energies, `mean` for ratios.
    needs:   what of the context it cannot do without: fields of `SiteContext` that may be absent.
    compute: a pure function of the context. Larger always means: matters more.
    paper:   where it comes from.
    texts:   whose statistics enter: its numbers change with any of them, and with no other. None for weights alone.
    error:   of a score that no text enters: the standard errors of the site, then of its columns (or rows), where rows
             are a sample of rows of their kind (`outliers.sample`). Of the others parts of texts are left out.
    null:    draws of the context with nothing to find. same: why its whole sites have their own value there, so that
             only columns and rows can be held against it; empty where they have not.
    """

    name: str
    title: str
    unit: str
    axis: str
    combine: str
    compute: Callable[[SiteContext], Tensor]
    needs: tuple[str, ...] = ()
    paper: str = ""
    texts: tuple[str, ...] = ("public",)
    error: Callable[[SiteContext], Float[Tensor, " 1+n"]] | None = None
    null: Null = null_contexts
    same: str = ""


def _reduce(score: Score, values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return values.sum(dims) if score.combine == "sum" else values.mean(dims)


def columns(score: Score, values: Tensor) -> Float[Tensor, " in"] | None:
    """One number per input column; None for a score that knows none."""
    if score.axis == "weight":
        return _reduce(score, values, 0)
    return values if score.axis == "column" else None


def rows(score: Score, values: Tensor) -> Float[Tensor, " out"] | None:
    """One number per output row; None for a score that knows none."""
    if score.axis == "weight":
        return _reduce(score, values, 1)
    return values if score.axis == "row" else None


def groups(score: Score, values: Tensor, size: int = GROUP) -> Tensor | None:
    """One number per `size` neighbouring columns: (out, groups) for weights, (groups,) for columns, else None.

    The last group may be narrower.
    """
    if score.axis not in ("weight", "column"):
        return None
    return torch.stack([_reduce(score, part, -1) for part in values.split(size, dim=-1)], dim=-1)


def site(score: Score, values: Tensor) -> Float[Tensor, ""]:
    """One number for the whole site."""
    return values if score.axis == "site" else _reduce(score, values, tuple(range(values.ndim)))

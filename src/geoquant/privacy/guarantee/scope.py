"""Which tensors of a model a guarantee speaks for. One tensor outside that carries private data, and there is none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoquant.errors import UserError

__all__ = ["Scope", "same_bits", "scope_of"]

SHOWN = 4


@dataclass(frozen=True)
class Scope:
    """covered: tensors that a mechanism released. public: bit for bit the public base's. uncovered: neither.

    base: which public base. chosen: who decided which tensors are covered; a choice made by looking at the private
    weights or records is itself a release, and nothing accounts for it.
    """

    covered: tuple[str, ...]
    public: tuple[str, ...]
    uncovered: tuple[str, ...] = ()
    base: str = "the public base"
    chosen: Literal["publicly", "privately"] = "publicly"

    def __post_init__(self) -> None:
        named = [*self.covered, *self.public, *self.uncovered]
        if len(set(named)) != len(named):
            raise ValueError("a tensor is covered, public or uncovered, and only one of them")

    def check(self) -> None:
        """Raises UserError where no guarantee can be given for the model."""
        if self.chosen != "publicly":
            raise UserError(
                "which tensors are noised was chosen by looking at private data, and no accounting covers that choice",
                fix="choose them by name, by the public base or by public text",
            )
        if self.uncovered:
            raise UserError(
                "tensors that carry private data are outside of the mechanism: the model has no guarantee",
                got=_named(self.uncovered),
                fix="release them through the mechanism too, or put the public base's in their place",
            )
        if not self.covered:
            raise UserError("nothing was released by a mechanism, so there is nothing to guarantee")

    @property
    def words(self) -> str:
        parts = [f"{len(self.covered)} of {len(self.covered) + len(self.public)} tensors: {_named(self.covered)}"]
        if self.public:
            parts.append(f"the rest is bit for bit of {self.base}: {_named(self.public)}")
        return "; ".join(parts)


def scope_of(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    covered: Collection[str],
    *,
    name: str = "the public base",
    chosen: Literal["publicly", "privately"] = "publicly",
) -> Scope:
    """The scope of a model as it would be shipped, judged by its bits.

    tensors: of the model. base: of the public base, as stored. covered: names that a mechanism released. A tensor that
    the base does not have, or has with another type or shape, is uncovered.
    """
    if absent := set(covered) - set(tensors):
        raise UserError("a covered tensor is not part of the model", got=_named(sorted(absent)))
    rest = [key for key in tensors if key not in set(covered)]
    public = [key for key in rest if key in base and same_bits(tensors[key], base[key])]
    return Scope(tuple(covered), tuple(public), tuple(key for key in rest if key not in set(public)), name, chosen)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Not `equal`: zeros of both signs differ, and a NaN is the same as itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _named(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

"""What is computed from tensors once, and remembered for as long as they live.

Sites that read the same inputs share the very tensors of their statistics, and many scores want the same factor of the
same metric: they ask here instead of passing it around. Tensors that are asked about must not be written to afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["eigenpairs", "remembered", "row_energies"]

Result = TypeVar("Result")

# By the first tensor; then by function and identity of the other tensors, which may be gone and their identity reused.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(function: Callable[..., Result], first: Tensor, *others: Tensor) -> Result:
    """`function(first, *others)`, computed once for these very tensors.

    function: one of a module (not a lambda), which returns something new: to keep one of its arguments would keep it
    alive for good.
    """
    known = _KNOWN.setdefault(first, {})
    key = (function, *map(id, others))
    if key in known:
        result, alive = known[key]
        if all(reference() is other for reference, other in zip(alive, others, strict=True)):
            return result
    result = function(first, *others)
    known[key] = result, tuple(weakref.ref(other) for other in others)
    return result


def row_energies(change: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """`change_i^T M change_i` of each row, for a positive M: what rounding leaves below zero is nothing."""
    return remembered(_row_energies, change, metric)


def _row_energies(change: Tensor, metric: Tensor) -> Tensor:
    return ((change @ metric) * change).sum(1).clamp_min(0)


def eigenpairs(metric: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues, the smallest first, and eigenvectors as columns."""
    return remembered(torch.linalg.eigh, metric)

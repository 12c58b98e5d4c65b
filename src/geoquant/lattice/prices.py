"""What codes cost an entropy coder, by their size and class: for searches that weigh one code against another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.rate import Spread, counted, spread_of

__all__ = ["Prices", "prices_of"]


@dataclass(frozen=True)
class Prices:
    """What codes cost: bits (classes, reach) of a code of each class by its size, never falling with it; the last
    column serves all sizes beyond. spread: the classes."""

    bits: Float[Tensor, "classes reach"]
    spread: Spread


def prices_of(codes: Int[Tensor, "out in"]) -> Prices:
    """Lengths of codes under the distributions of these codes' own classes, both signs taken together.

    A size that was not seen counts half a code. So that chance does not make a larger code cheaper, lengths are made
    non-decreasing; of a class without codes all are equal.
    """
    spread = spread_of(codes)
    counts = counted(codes, spread)[:, :-1].double()
    reach = counts.shape[1] // 2
    sizes = torch.nn.functional.pad(counts[:, reach:], (0, 1))
    sizes[:, 1:-1] += counts[:, :reach].flip(1)
    sizes[:, 1:] /= 2  # both signs
    seen = int(torch.nonzero(sizes.sum(0)).max()) if sizes.any() else 0
    sizes = sizes[:, : seen + 2] + 0.5
    bits = (sizes[:, :1] + 2 * sizes[:, 1:].sum(1, keepdim=True)).log2() - sizes.log2()
    return Prices(bits.cummax(1).values.float(), spread)

"""Solved weights into the model."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from geoquant.model.walk import Stage, write_weight

__all__ = ["install"]

PART = 1 << 13  # rows made at a time


class Solved(Protocol):
    """Codes of stacked rows that stand for weights, whatever the grid."""

    codes: Integer[Tensor, "out in"]

    def rows(self, start: int, stop: int) -> Solved: ...

    def dequantize(self) -> Float[Tensor, "out in"]: ...


def install(model: nn.Module, stage: Stage, solution: Solved) -> None:
    """Replace the weights of a stage's sites with the quantized values."""
    start = 0
    for site in stage.sites:
        module, stop = model.get_submodule(site.name), start + site.shape[0]
        weight = torch.empty(site.shape, dtype=module.weight.dtype, device=solution.codes.device)
        for first in range(start, stop, PART):
            last = min(first + PART, stop)
            weight[first - start : last - start] = solution.rows(first, last).dequantize()
        write_weight(module, weight)
        start = stop

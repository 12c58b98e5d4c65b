"""Steps as float16, which GPTQ and GGUF files store; ours are bfloat16, with fewer digits but a far wider range.

A bfloat16 step has 8 significant bits, float16 has 11: between 2^-17 and 65504 every step survives unchanged. Above, a
file would hold infinities: refused. Below, float16 has fewer digits left (and none below 2^-25): such steps are
rounded and counted, and the report says by how much a weight moved at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.errors import UserError

__all__ = ["Rounding", "half_steps"]


@dataclass(frozen=True)
class Rounding:
    """How many steps (and offsets made of them) float16 changed, and the largest change of a weight by that."""

    steps: int = 0
    largest: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.steps + other.steps, max(self.largest, other.largest))

    def notes(self) -> tuple[str, ...]:
        """One line for the report, or none where every step survived."""
        if not self.steps:
            return ()
        what = "steps or offsets were rounded to float16"
        return (f"{self.steps} {what}; weights changed by at most {self.largest:.2g}",)


def half_steps(
    name: str, scales: Float[Tensor, "out groups"], reach: Float[Tensor, "out groups"]
) -> tuple[Float[Tensor, "out groups"], Rounding]:
    """`scales` in float16, and what that changed.

    reach: largest `|code - zero_point|` of each group. Where it is 0 the step means nothing and is written as 0 if
    float16 cannot hold it. Raises UserError naming site `name` for a step beyond 65504 that is used.
    """
    exact = scales.float()
    half = exact.to(torch.float16)
    half = torch.where((reach == 0) & (half.float() != exact), 0.0, half)
    if not bool(half.isfinite().all()):
        raise UserError(
            f"{name} has steps that float16 cannot hold",
            got=f"{exact.abs().max().item():.3g}",
            wanted="at most 65504",
            fix="choose the format compressed-tensors or dense",
        )
    moved = (half.float() - exact).abs() * reach
    return half, Rounding(int((moved > 0).sum()), moved.max().item() if moved.numel() else 0.0)

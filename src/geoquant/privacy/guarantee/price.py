"""What noise leaves of a weight's bits, known before any private weight is read.

Rounding to steps of size D errs by D^2 / 12 on average, noise of standard deviation `s D` adds `s^2 D^2`: together as
much as rounding with steps that are `sqrt(1 + 12 s^2)` times wider, so that of b bits are left

    b - 1/2 log2(1 + 12 s^2).

D is the step at which Gaussian weights of the base's root mean square have b bits of entropy, `rms sqrt(2 pi e) / 2^b`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["USEFUL", "Price", "bits_left", "price_of"]

USEFUL = 2.0  # bits: below, a model keeps little of what it could do


@dataclass(frozen=True)
class Price:
    """sigma: of the noise, in units of the weights. steps: sigma in steps of `bits` bits, a mean over weights (in the
    logarithm of `1 + 12 s^2`). left: bits that remain, 0 or less where noise is all there is.
    """

    sigma: float
    bits: float
    left: float

    @property
    def steps(self) -> float:
        return math.sqrt((4 ** (self.bits - self.left) - 1) / 12)

    @property
    def hopeless(self) -> bool:
        return self.left < USEFUL

    @property
    def words(self) -> str:
        """For the user, before the work."""
        left = f"{max(self.left, 0):.2f} of {self.bits:g} bits per weight remain"
        said = f"noise of {self.sigma:.3g} on every weight, {self.steps:.3g} steps of the grid: {left}"
        if not self.hopeless:
            return said
        return (
            f"{said}; expect no useful model. A record-level guarantee at useful quality comes from training with "
            "DP-SGD: give its statement by --inherited, and compress without noise"
        )


def bits_left(bits: float, steps: float) -> float:
    """`b - 1/2 log2(1 + 12 s^2)`, steps s: noise in steps of the grid."""
    return bits - 0.5 * math.log2(1 + 12 * steps * steps)


def price_of(base: Mapping[str, Tensor], sigma: float, bits: float) -> Price:
    """The mean over all weights of the base's matrices (vectors are few)."""
    lost = count = 0.0
    for tensor in base.values():
        if tensor.ndim < 2:
            continue
        rms = float(tensor.float().square().mean().sqrt())
        if rms > 0:
            step = rms * math.sqrt(2 * math.pi * math.e) / 2**bits
            lost += tensor.numel() * (bits - bits_left(bits, sigma / step))
            count += tensor.numel()
    return Price(sigma, bits, bits - lost / count if count else bits)

"""Babai with a price on bits: of the codes near a plane's centre take the one with the least error plus price of bits.

On an entropy-coded lattice a code is not free: zero costs a fraction of a bit, a large code many. Rounding to nearest
ignores that. Here column j of row i, whose centre lies at u in units of its step, takes the integer z that minimises

    d_ij (u - z)^2 + mu bits_k(z)

with d_ij what a squared step costs in units of `D^2` (one, but for steps that were rounded or tied), bits_k the length
of z in the code of its class k, and mu the price of a bit in the same units; later columns and rows compensate for the
code that was chosen. Known from video coding as rate-distortion-optimised quantization (Sullivan and Wiegand 1998).

Two facts fix mu and say what to expect. At the same slope, one bit less per code quadruples the error of a fine
lattice, 1/12 per code, so `mu = 2 ln(2) / 12 = 0.116`. And for codes of a Gaussian with variance v the rule becomes
`z = round(u v / (v + 1/12))`: Wiener's shrinkage, since rounding errors are strangers to the weights and hence no
strangers to the codes. It is worth `-1/2 log2(1 - 1/(12 v + 1))` bits per code: 0.03 at 2.5 bits, 0.06 at 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.beside import Tariff
from geoquant.lattice.rate import Spread, counted, spread_of
from geoquant.lattice.rows import RowMetric
from geoquant.lattice.unboxed import unboxed_babai

__all__ = ["FINE", "Prices", "priced_babai", "prices_of"]

FINE = 2 * math.log(2) / 12  # price of a bit, in squared steps, on a fine lattice


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


def priced_babai(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    row_steps: Float[Tensor, " out"],
    column_steps: Float[Tensor, " in"],
    rows: RowMetric | None,
    prices: Prices,
    row_costs: Float[Tensor, " out"],
    column_costs: Float[Tensor, " in"],
    mu: float,
) -> Integer[Tensor, "out in"]:
    """Codes z with `q_ij = row_steps_i column_steps_j z_ij`; the first six arguments as in `unboxed_babai`.

    row_costs, column_costs: `d_ij = row_costs_i column_costs_j`, original order. mu: price of a bit; 0 is Babai.
    Compiled, on the CPU, in single precision.
    """
    bits = prices.bits.cpu().float()
    saved = mu * torch.diff(bits, dim=1, prepend=bits[:, :1], append=bits[:, -1:])
    classes = (x.cpu().float() for x in (prices.spread.rows, prices.spread.columns))
    tariff = Tariff(row_costs.cpu().float(), column_costs.cpu().float(), saved.contiguous(), *classes)
    known = None if rows is None else replace(rows, factor=rows.factor.cpu())
    given = (x.cpu() for x in (weight, basis.float(), order, row_steps, column_steps))
    return unboxed_babai(*given, known, tariff).to(weight.device)

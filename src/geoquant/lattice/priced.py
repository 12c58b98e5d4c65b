"""A price on bits, in closed form: centres are drawn towards zero before they are rounded.

On an entropy-coded lattice a code is not free: zero costs a fraction of a bit, a large code many. Rounding to nearest
ignores that. The code z of a centre u, in units of its step, should minimise `d (u - z)^2 + mu bits(z)`, with d what a
squared step costs in units of `D^2` (one, but for steps that were rounded or tied) and mu the price of a bit; later
columns and rows compensate for the code that was chosen. Known from video coding as rate-distortion-optimised
quantization (Sullivan and Wiegand 1998).

Codes of one row and column are close to Gaussian, of a variance v that is known before any of them is:
`bits(z) = z^2 / (2 v ln 2) + const`, and the minimum is at

    z = round(u / (1 + mu / (2 ln(2) d v)))

Wiener's shrinkage, since rounding errors are strangers to the weights and hence no strangers to the codes. So no first
pass has to find out what codes cost. At the same slope one bit less per code quadruples the error of a fine lattice,
1/12 per code, so `mu = 2 ln(2) / 12 = 0.116`, and it is worth `-1/2 log2(1 - 1/(12 v + 1))` bits per code: 0.03 at 2.5
bits, 0.06 at 2.

The codes of `q = w - e` are as large as weights and errors together. Every row and column hands its rounding on to
those after it: with the factors U and the steps a and b of both sides

    E[e_ij^2] = (1/12) sum_k (U_ki a_k / U_kk)^2 sum_l (U_lj b_l / U_ll)^2

Where all `r_j b_j` are alike the second sum is their square times `(A^-1)_jj`, and where inputs resemble each other
that is far more than `b_j^2`. v is fitted as a product of a number per row and one per column, as the classes of the
coder are. No centre goes further than one step: the law says nothing of an outlier.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.lattice.beside import Pulls

__all__ = ["FINE", "pulls_of", "variances"]

FINE = 2 * math.log(2) / 12  # price of a bit, in squared steps, on a fine lattice
ROUNDS = 2
ROWS = 1 << 13


def variances(
    weight: Float[Tensor, "out in"],
    row_steps: Float[Tensor, " out"],
    column_steps: Float[Tensor, " in"],
    row_errors: Float[Tensor, " out"],
    column_errors: Float[Tensor, " in"],
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Factors of the variance of the codes, `rows_i columns_j`, a few thousand rows at a time.

    row_errors, column_errors: squares of errors in units of a step, expected, without the twelfth; by product.
    """
    column_steps, column_errors = column_steps.float(), column_errors.float()
    columns, scales = torch.ones_like(column_steps), column_steps.square().reciprocal()
    for _ in range(ROUNDS):
        shares, found = columns.reciprocal() / len(columns), []
        columns = torch.zeros_like(columns)
        for part, steps, errors in zip(*(x.float().split(ROWS) for x in (weight, row_steps, row_errors))):
            # In units of its row's step no weight has more than fit into an integer: no square overflows.
            squares = (part / steps[:, None]).square_()
            rows = squares @ (scales * shares) + errors * ((column_errors @ shares) / 12)
            inverse = rows.reciprocal() / len(weight)
            columns += scales * (inverse @ squares) + column_errors * ((errors @ inverse) / 12)
            found.append(rows)
    return torch.cat(found), columns


def pulls_of(
    variance: tuple[Float[Tensor, " out"], Float[Tensor, " in"]],
    cost: tuple[Float[Tensor, " out"], Float[Tensor, " in"]],
    mu: float,
) -> Pulls:
    """At a price mu of a bit, of codes with these factors of their variance and of `d`; zero is Babai."""
    rows, columns = (known * price for known, price in zip(variance, cost))
    return Pulls(mu / (2 * math.log(2)) / rows, columns.reciprocal())

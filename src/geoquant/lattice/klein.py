"""Klein's randomised nearest plane: Babai, but every code is drawn around its centre instead of rounded to it.

Column j, whose Gram-Schmidt length is r_j, draws its code from the discrete Gaussian of standard deviation
`sigma / (r_j s_j)` around Babai's centre (Klein 2000; Gentry, Peikert, Vaikuntanathan 2008). Once sigma is above half
of the largest `r_j s_j`, the error of a row of c columns is `c sigma^2`, whatever the spectrum of the metric; isotropic
noise of the same size costs `sigma^2 s^2 tr A`.

It samples the ideal Gaussian on the lattice only for sigma above about 0.8 of the largest `r_j s_j`. Below that it is
randomised rounding, and nothing is claimed of its distribution. No privacy follows from using it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["discrete_gaussian", "klein"]

TAIL = 7.0  # standard deviations beyond which a code is never drawn: odds below 1e-11


def discrete_gaussian(
    centre: Float[Tensor, " n"], deviation: float, generator: torch.Generator | None = None
) -> Float[Tensor, " n"]:
    """Integers z with probability proportional to `exp(-(z - centre)^2 / (2 deviation^2))`, by inversion.

    A deviation so small that only one integer has any weight rounds to nearest.
    """
    reach = math.ceil(TAIL * deviation) + 1
    nearest = torch.round(centre)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=centre.device)
    distance = (nearest - centre).double()[:, None] + offsets
    # Relative to the nearest integer, whose weight is then one: nothing underflows to a row of zeros.
    exponent = (distance[:, reach : reach + 1].square() - distance.square()) / (2 * max(deviation, 1e-12) ** 2)
    weights = exponent.exp_().cumsum(1)
    drawn = torch.rand(len(centre), 1, dtype=torch.float64, generator=generator, device=centre.device)
    place = torch.searchsorted(weights, drawn * weights[:, -1:]).clamp_max_(2 * reach)[:, 0]
    return nearest + offsets[place].to(centre.dtype)


def klein(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    row_steps: Float[Tensor, " out"],
    column_steps: Float[Tensor, " in"],
    sigma: float,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "out in"]:
    """Codes z (int32) with `q_ij = row_steps_i column_steps_j z_ij`; arguments as in `unboxed_babai`.

    sigma: in units of a row's own step times Gram-Schmidt length, so that one value fits all rows. sigma = 0 is Babai.
    """
    work = (weight / row_steps[:, None]).T[order].contiguous()
    steps, pivots = column_steps[order].tolist(), factor.diagonal().reciprocal().tolist()
    codes = torch.empty(work.shape, dtype=torch.int32, device=weight.device)
    for j, (step, pivot) in enumerate(zip(steps, pivots)):
        # pivot = r_j: the length of this column given those that come after it.
        code = discrete_gaussian(work[j] / step, sigma / (pivot * step), generator)
        codes[order[j]] = code.to(torch.int32)
        error = (work[j] - code * step) * pivot
        work[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1.0)
    return codes.T.contiguous()

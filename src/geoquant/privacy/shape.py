"""Noise shaped by the metric of the inputs: large where the function does not look, small where it does.

    n ~ N(0, sigma^2 A^-1),      E[n A n^T] = sigma^2 c      for a row of c columns

With `A^-1 = U^T U` it is `sigma xi U` for standard normal xi. Nearest-plane rounding of `w + n` is, run for run, the
recursion on w in which every column draws its centre with a deviation of `sigma U_jj`: the real-valued twin of Klein's
randomised rounding (lattice/klein). Noise of one size in every column instead of `U_jj` is no such thing.

Isotropic noise is the baseline: of the same expected error it has `tau^2 = sigma^2 c / tr A`, since
`E[n A n^T] = tau^2 tr A`.

Both come from torch's generator, whose seed anyone may know: a lever against attacks that were measured, and no
mechanism. For a guarantee see privacy/guarantee.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["equal_deviation", "isotropic_noise", "metric_noise"]


def metric_noise(
    scales: Float[Tensor, " out"],
    factor: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    generator: torch.Generator,
) -> Float[Tensor, "out in"]:
    """Rows of `N(0, scales_i^2 A^-1)`, columns in the original order.

    scales: sigma of each row; in proportion to the rows' steps it is noise in the metric `G (x) A`. factor: `U` of
    `compensation_factor` in `order`: the damped metric's, and it is this one that the noise is shaped by.
    """
    drawn = torch.randn(len(scales), len(order), generator=generator, dtype=factor.dtype, device=factor.device)
    noise = torch.empty_like(drawn)
    noise[:, order] = (drawn * scales[:, None].to(factor)) @ factor
    return noise


def equal_deviation(metric: Float[Tensor, "in in"], factor: Float[Tensor, "in in"], order: Int[Tensor, " in"]) -> float:
    """tau / sigma at which isotropic noise costs as much as metric noise: `sqrt(tr(U A U^T) / tr A)`.

    metric: A that errors are counted in; factor: of the damped one that shapes the noise.
    """
    known = metric.index_select(0, order).index_select(1, order).to(factor)
    return (((factor @ known) * factor).sum() / known.diagonal().sum()).sqrt().item()


def isotropic_noise(
    scales: Float[Tensor, " out"], columns: int, ratio: float, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Rows of `N(0, (ratio scales_i)^2 I)`; with `equal_deviation` as ratio, of the same expected error."""
    drawn = torch.randn(len(scales), columns, generator=generator, dtype=scales.dtype, device=scales.device)
    return drawn * (ratio * scales[:, None])

"""The jackknife by its definition: every value at once, nothing clever."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from geoquant.outliers.statistics import Statistics, left_out, total

__all__ = ["jackknife"]


def jackknife(parts: Sequence[Statistics], value: Callable[[Statistics], Tensor]) -> Tensor:
    """Standard error of `value(total(parts))` by leaving out one part at a time.

    `sqrt((K - 1) / K sum_k (v_k - mean)^2)`, Efron and Stein: The jackknife estimate of variance, Annals of
    Statistics 1981. Parts are of about one size and independent of one another (whole sequences). NaN for one part.
    It holds for values that are smooth functions of the sums; of a maximum or a quantile it says little.
    """
    count = len(parts)
    if count < 2:
        return torch.full_like(value(total(parts)), torch.nan)
    left = torch.stack([value(rest) for rest in left_out(parts)])
    return ((left - left.mean(0)).square().sum(0) * (count - 1) / count).sqrt()

"""Standard errors of what weights alone say: the rows of a matrix taken as a sample of rows of their kind.

Weights are known exactly, so such an error is not that of a measurement. It says how far a number would go if the layer
had other output rows of the same kind (columns, for numbers of rows): whether it is carried by a few of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["error_of_means", "jackknifed", "median_error"]


def error_of_means(values: Float[Tensor, "n ..."]) -> Float[Tensor, ...]:
    """Of the mean over the first axis: `std / sqrt(n)`, which is also its delete-one jackknife; NaN of one value."""
    return values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], torch.nan)


def jackknifed(without: Float[Tensor, "n ..."]) -> Float[Tensor, ...]:
    """`sqrt((n - 1) / n sum_i (v_i - mean)^2)` of numbers v_i without the i-th row (Efron and Stein, Annals of
    Statistics 1981); NaN of one row.
    """
    count = len(without)
    return without.std(0) * (count - 1) / count**0.5 if count > 1 else torch.full_like(without[0], torch.nan)


def median_error(values: Float[Tensor, " n"]) -> float:
    """Of the median: half the distance between the quantiles `1/2 +- 1 / (2 sqrt(n))`, one standard error of the share
    below it to either side (Woodruff, Journal of the American Statistical Association 1952); NaN below four values.
    """
    count = len(values)
    if count < 4:
        return torch.nan
    half = 0.5 / count**0.5
    low, high = values.double().quantile(torch.tensor([0.5 - half, 0.5 + half], dtype=torch.float64).to(values.device))
    return (high - low).item() / 2

"""How heavy the tails are: of the weights of a site, a row or a column, and of the inputs of a column.

Excess kurtosis `m_4 / m_2^2 - 3`, zero for a Gaussian, -2 at least, below the number of values. KurtBoost ranks layers
by that of all their weights: Zhang, Liu, Li, Lv, Wang, Bai: Towards superior quantization accuracy: a layer-sensitive
approach, arXiv 2503.06518 (2025). Rows, columns and inputs are our readings of the same idea. Inputs are taken about
zero, the point about which activations are quantized: their mean is not known here.

Constant values, and a column that has no input, have zero. Shuffling weights leaves the kurtosis of a whole site as it
is: the null of that score is made of Gaussian weights instead, about zero. That of inputs is known by formula, zero,
and has no spread: what few tokens do to it is in the standard error alone.

Standard errors of scores of weights take rows for a sample of rows (of a row: its columns for one of columns) and leave
out one at a time. That of heavy tails is itself uncertain: it rests on the few weights that make them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.own_nulls import bell_weights
from geoquant.outliers.sample import error_of_means, jackknifed
from geoquant.outliers.score import Score

__all__ = ["SCORES", "excess_kurtosis", "input_kurtosis"]


def excess_kurtosis(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Of the values along the last axis, the biased moments."""
    values = values.double()
    centred = values - values.mean(-1, keepdim=True)
    second = centred.square().mean(-1)
    # A constant's distance from its own mean is rounding.
    constant = second <= 1e-12 * values.square().mean(-1)
    fourth = centred.pow(4).mean(-1)
    return torch.where(constant, 0.0, fourth / second.square().clamp_min(1e-300) - 3).float()


def input_kurtosis(context: SiteContext) -> Float[Tensor, " in"]:
    """Excess kurtosis about zero of each column's inputs."""
    second, fourth = context.public.mean("hessian").diagonal().double(), context.public.mean("fourth").double()
    return torch.where(second > 0, fourth / second.square().clamp_min(1e-300) - 3, 0.0).float()


def kurtosis_without_one(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Excess kurtosis of each column of `values` without its i-th number, from sums of powers, in double precision."""
    return _without_one(_powers(values.double() - values.double().mean(0)), 1)


def _powers(values: Tensor) -> list[Tensor]:
    squares = values.square()
    return [values, squares, values * squares, squares.square()]


def _without_one(powers: list[Float[Tensor, "n m"]], each: int) -> Float[Tensor, "n m"]:
    """The same from sums of powers about any centre: `powers[k][i]` over the `each` numbers of the i-th row."""
    count = (len(powers[0]) - 1) * each
    one, two, three, four = ((power.sum(0) - power) / max(count, 1) for power in powers)
    second = two - one**2
    fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
    constant = second <= 1e-12 * powers[1].mean(0) / each
    return torch.where(constant, 0.0, fourth / second.square().clamp_min(1e-300) - 3)


def _site_error(context: SiteContext) -> Float[Tensor, " 1"]:
    centred = context.weight.double() - context.weight.double().mean()
    powers = [power.sum(1, keepdim=True) for power in _powers(centred)]
    return jackknifed(_without_one(powers, centred.shape[1])).float()


def _column_error(context: SiteContext) -> Float[Tensor, " 1+in"]:
    without = kurtosis_without_one(context.weight)
    return jackknifed(torch.cat([without.mean(1, keepdim=True), without], dim=1)).float()


def _row_error(context: SiteContext) -> Float[Tensor, " 1+out"]:
    whole = error_of_means(excess_kurtosis(context.weight)[:, None])
    return torch.cat([whole, jackknifed(kurtosis_without_one(context.weight.T)).float()])


SCORES = (
    Score(
        "kurtosis",
        "excess kurtosis of the site's weights",
        "",
        "site",
        "mean",
        lambda context: excess_kurtosis(context.weight.flatten()),
        paper="KurtBoost, arXiv 2503.06518",
        texts=(),
        error=_site_error,
        null=bell_weights,
    ),
    Score(
        "kurtosis_row",
        "excess kurtosis of a row's weights",
        "",
        "row",
        "mean",
        lambda context: excess_kurtosis(context.weight),
        texts=(),
        error=_row_error,
    ),
    Score(
        "kurtosis_column",
        "excess kurtosis of a column's weights",
        "",
        "column",
        "mean",
        lambda context: excess_kurtosis(context.weight.T),
        texts=(),
        error=_column_error,
    ),
    Score("kurtosis_input", "excess kurtosis of a column's inputs", "", "column", "mean", input_kurtosis),
)

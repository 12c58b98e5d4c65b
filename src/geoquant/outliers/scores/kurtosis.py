"""How heavy the tails are: of the weights of a site, a row or a column, and of the inputs of a column.

Excess kurtosis `m_4 / m_2^2 - 3`, zero for a Gaussian, -2 at least, below the number of values. KurtBoost ranks layers
by that of all their weights: Zhang, Liu, Li, Lv, Wang, Bai: Towards superior quantization accuracy: a layer-sensitive
approach, arXiv 2503.06518 (2025). Rows, columns and inputs are our readings of the same idea. Inputs are taken about
zero, the point about which activations are quantized: their mean is not known here.

Constant values, and a column that has no input, have zero. Shuffling weights leaves the kurtosis of a whole site as it
is: there the null says nothing, and what to compare with is a Gaussian's zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
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
    ),
    Score(
        "kurtosis_row",
        "excess kurtosis of a row's weights",
        "",
        "row",
        "mean",
        lambda context: excess_kurtosis(context.weight),
        texts=(),
    ),
    Score(
        "kurtosis_column",
        "excess kurtosis of a column's weights",
        "",
        "column",
        "mean",
        lambda context: excess_kurtosis(context.weight.T),
        texts=(),
    ),
    Score("kurtosis_input", "excess kurtosis of a column's inputs", "", "column", "mean", input_kurtosis),
)

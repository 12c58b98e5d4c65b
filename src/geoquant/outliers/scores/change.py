"""How far a weight has moved from the public base: |W - W_base| and its square.

Measured on its own, it does not find memories; as a factor it does (see `privacy`). The null shuffles changes: it is a
null for columns, rows and groups. A whole site keeps what it has, and a null of its own would have to say how far a
layer without anything private moves, which no layer tells by itself: what a fine-tune of other records does tells it.

The standard error takes rows for a sample of rows: exactly known, a change may still be that of a few rows.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.sample import error_of_means
from geoquant.outliers.score import Score

__all__ = ["SCORES", "change"]


def change(context: SiteContext) -> Float[Tensor, "out in"]:
    """W - W_base."""
    return context.weight - context.base


def _error(context: SiteContext, power: int) -> Float[Tensor, " 1+in"]:
    """Of the mean of |change|, or of the sum of its squares, at the site and in each column."""
    values = change(context).abs().pow(power)
    whole = values.mean(1) if power == 1 else values.sum(1)
    found = error_of_means(torch.cat([whole[:, None], values], dim=1))
    return found if power == 1 else len(values) * found  # a sum is so many means


SAME = "shuffling leaves a site what it has"

SCORES = (
    Score(
        "change",
        "distance of a weight from the public base",
        "weight",
        "weight",
        "mean",
        lambda context: change(context).abs(),
        ("base",),
        texts=(),
        error=partial(_error, power=1),
        same=SAME,
    ),
    Score(
        "change_squared",
        "squared distance of the weights from the public base",
        "squared weight",
        "weight",
        "sum",
        lambda context: change(context).square(),
        ("base",),
        texts=(),
        error=partial(_error, power=2),
        same=SAME,
    ),
)

"""How far a weight has moved from the public base: |W - W_base| and its square.

Measured on its own, it does not find memories; as a factor it does (see `privacy`). The null shuffles changes: it is a
null for columns, rows and groups, not for a whole site, which keeps what it has.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "change"]


def change(context: SiteContext) -> Float[Tensor, "out in"]:
    """W - W_base."""
    return context.weight - context.base


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
    ),
)

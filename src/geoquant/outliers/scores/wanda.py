"""Wanda's importance of a weight, and OWL's share of weights far above it.

    wanda   |W_ij| sqrt(E x_j^2)
    owl     1 where wanda_ij > 5 mean(wanda), else 0: its mean over a site is the outlier ratio

Sun, Liu, Bair, Kolter: A simple and effective pruning approach for large language models, ICLR 2024, with the norm of
x_j over all tokens; here per token, so that sites seen by different numbers of tokens compare. Yin et al.: Outlier
weighed layerwise sparsity (OWL), ICML 2024, over a whole block (`outliers.outlier_ratio`, with the same 5); here weight
by weight, the mean over a site its ratio. Neither knows of a rounding error.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.outlier_ratio import MEANS
from geoquant.outliers.score import Score

__all__ = ["SCORES", "owl", "wanda"]


def wanda(context: SiteContext) -> Float[Tensor, "out in"]:
    """Size of each weight's contribution to its output."""
    return context.weight.abs() * context.public.mean("hessian").diagonal().sqrt()


def owl(context: SiteContext) -> Float[Tensor, "out in"]:
    """One for each weight far above the mean of its site."""
    importance = wanda(context)
    return (importance > MEANS * importance.mean()).to(importance.dtype)


SCORES = (
    Score(
        "wanda",
        "size of a weight times that of its input",
        "output",
        "weight",
        "mean",
        wanda,
        paper="Wanda, Sun et al., ICLR 2024",
    ),
    Score(
        "owl",
        "share of weights whose contribution is 5 times the mean",
        "",
        "weight",
        "mean",
        owl,
        paper="OWL, Yin et al., ICML 2024",
    ),
)

"""How much the inputs' metric turns from one part of public text to another: what codes fitted to it may over-fit.

    instability          mean over pairs of parts of  rms_i |log lambda_i(A_p^-1 A_q)|
    condition_variance   variance over parts of the condition number of the basis,  sqrt(lambda_1 / lambda_n) of A_p

with A_p the second moment of at most 128 inputs, evenly spaced, over the tokens of part p. Of fewer inputs the metric
of a part is one and not a damping: a thousand tokens leave that of 1536 inputs singular.

The first is the affine-invariant distance per dimension (`geometry.stability`); 1% of each input's own mean square is
added to A_p, so that the unit of no input matters. It is not zero for parts that are alike, only for parts of endless
length: about the square root of `2 (n + 1) / tokens` for n inputs and so many independent Gaussian tokens in a part,
which the null has. Neighbouring tokens are not independent, which adds to it as a change of subject does.

The second is the published stability index `1 / (1 + Var kappa)` turned over, so that larger matters more; the order is
that of the index. 1% of the mean square of all inputs is added. It depends on the units of single inputs, and the
damping bounds it: it stands here for comparison.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.geometry.stability import ratios
from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["DAMPING", "SCORES", "condition_variance", "instability"]

DAMPING = 0.01


def instability(context: SiteContext) -> Float[Tensor, ""]:
    """Mean affine-invariant distance of the parts' metrics; zero for one part, and for inputs that are all silent."""
    metrics = context.public_metrics.double()
    squares = metrics.mean(0).diagonal()
    alive = squares > 0
    if len(metrics) < 2 or not alive.any():
        return torch.zeros((), device=metrics.device)
    scale = squares[alive].rsqrt()
    unit = metrics[:, alive][:, :, alive] * scale[:, None] * scale
    unit = unit + DAMPING * torch.eye(len(scale), dtype=unit.dtype, device=unit.device)
    first, second = torch.combinations(torch.arange(len(unit), device=unit.device)).T
    return ratios(unit[first], unit[second]).log().square().mean(1).sqrt().mean().float()


def condition_variance(context: SiteContext) -> Float[Tensor, ""]:
    """Variance of the parts' condition numbers; zero for one part, and for inputs that are all silent."""
    metrics = context.public_metrics.double()
    damping = DAMPING * metrics.diagonal(dim1=1, dim2=2).mean()
    if len(metrics) < 2 or not damping > 0:
        return torch.zeros((), device=metrics.device)
    values = torch.linalg.eigvalsh(metrics).clamp_min(0) + damping
    return (values[:, -1] / values[:, 0]).sqrt().var().float()


SCORES = (
    Score(
        "instability",
        "how much the inputs' metric changes from one part of public text to another",
        "",
        "site",
        "mean",
        instability,
        ("public_metrics",),
        paper="distance: Pennec, Fillard, Ayache, IJCV 2006",
    ),
    Score(
        "condition_variance",
        "variance of the metric's condition number over parts of public text (the stability index, turned over)",
        "",
        "site",
        "mean",
        condition_variance,
        ("public_metrics",),
    ),
)

"""Whether private and public text pull the weights the same way: cosine of their gradients.

    <D_priv, D_pub> / (||D_priv|| ||D_pub||)

over a column, a row or the whole site, in [-1, 1]. Towards 1 one step serves both texts: what is done to such weights
is done to both, they are shared. Towards -1 a step that serves private text costs public text, and taking it back costs
public text nothing. Larger means: matters more to both alike. About 0 is what directions have that know nothing of each
other, and also what noise makes of small gradients: a model that knows its text has nearly none left. Zero where a
gradient is zero.

On the null gradients are independent; how widely their cosine then spreads goes with how few directions the inputs
have, not with the number of weights. Any two texts of one language agree better than that: what is private about a
figure shows beside the same cosine of unseen records (`text="domain"`).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "alignment"]


def alignment(context: SiteContext, dims: tuple[int, ...], text: str = "private") -> Tensor:
    """Cosine between the gradients of `text` and of public text, over these axes of (out, in)."""
    one, other = getattr(context, text).mean("gradient").double(), context.public.mean("gradient").double()
    lengths = one.square().sum(dims).sqrt() * other.square().sum(dims).sqrt()
    return ((one * other).sum(dims) / lengths.clamp_min(1e-300)).clamp(-1, 1).float()


SCORES = tuple(
    Score(
        f"alignment_{axis}",
        f"whether private and public text pull a {axis} the same way (1) or against each other (-1)",
        "",
        axis,
        "mean",
        partial(alignment, dims=dims),
        ("private",),
        texts=("public", "private"),
    )
    for axis, dims in (("column", (0,)), ("row", (1,)), ("site", (0, 1)))
)

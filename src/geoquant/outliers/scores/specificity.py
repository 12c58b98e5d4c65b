"""How differently a column's inputs are spread on private and on public text: Jensen-Shannon distance.

    sqrt(1/2 KL(p | m) + 1/2 KL(q | m)),   m = (p + q) / 2,   KL in bits

of the column's histograms, in [0, 1]: zero for the same, one for no value in common. Few tokens make two histograms of
one law differ: about `(bins in use - 1) / (8 ln 2) (1/n + 1/m)` under the root. The null has that too, but of
independent tokens, which those of a text are not: what is private about private text shows beside the same distance of
unseen records of its kind (`specificity_domain`).

Lin: Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 1991; that the root is a
distance: Endres and Schindelin, IEEE Transactions on Information Theory 2003.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score

__all__ = ["SCORES", "jensen_shannon"]


def jensen_shannon(p: Float[Tensor, "n bins"], q: Float[Tensor, "n bins"]) -> Float[Tensor, " n"]:
    """Distance between the rows of two tables of counts; zero where a row of either is empty."""
    empty = (p.sum(1) == 0) | (q.sum(1) == 0)
    p, q = (counts.double() / counts.double().sum(1, keepdim=True).clamp_min(1e-300) for counts in (p, q))
    middle = (p + q) / 2
    bits = sum(torch.special.xlogy(part, part / middle.clamp_min(1e-300)).sum(1) for part in (p, q)) / 2
    distance = (bits / torch.log(torch.tensor(2.0, dtype=bits.dtype))).clamp(0, 1).sqrt()
    return torch.where(empty, 0.0, distance).float()


def _from_public(context: SiteContext, text: str) -> Float[Tensor, " in"]:
    return jensen_shannon(getattr(context, text).histogram, context.public.histogram)


SCORES = tuple(
    Score(
        name,
        f"how differently a column's inputs are spread on {what} and on public text",
        "",
        "column",
        "mean",
        partial(_from_public, text=text),
        (text,),
        texts=("public", text),
    )
    for name, text, what in (
        ("specificity", "private", "private records"),
        ("specificity_domain", "domain", "unseen records of their kind"),
    )
)

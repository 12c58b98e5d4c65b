"""Where a fine-tune has put what only private text needs: change from the base times private over public Fisher.

    privacy_ratio    dW^2 F_priv / (F_pub + e),   e = 10% of the site's mean F_pub
    privacy_excess   dW^2 (F_priv - F_pub) / 2
    privacy_memory   dW^2 F_priv / (F_dom + e),   e = 10% of the site's mean F_dom

with F diagonal empirical Fishers, per token, and dW = W - W_base. The ratio is the one that reverting weights to the
base was measured to work by, and has the unit of dW^2. The excess is in nats per token: to second order, what private
text loses by going back to the base beyond what public text loses, each weight alone; below zero where public text
loses more. The third asks for the records themselves instead of their kind: unseen records in place of public text. e
keeps a weight that public text does not use from counting as infinitely private.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.score import Score
from geoquant.outliers.scores.change import change

__all__ = ["SCORES", "SHARE", "privacy_excess", "privacy_ratio"]

SHARE = 0.1


def privacy_ratio(context: SiteContext, other: str = "public") -> Float[Tensor, "out in"]:
    """`dW^2 F_priv / (F_other + e)`; zero where neither text has a gradient."""
    below = getattr(context, other).mean("fisher")
    ratio = context.private.mean("fisher") / (below + SHARE * below.mean()).clamp_min(1e-30)
    return change(context).square() * ratio


def privacy_excess(context: SiteContext) -> Float[Tensor, "out in"]:
    """`dW^2 (F_priv - F_pub) / 2`."""
    difference = context.private.mean("fisher") - context.public.mean("fisher")
    return change(context).square() * difference / 2


SCORES = (
    Score(
        "privacy_ratio",
        "change from the base where private text needs it and public text does not",
        "squared weight",
        "weight",
        "sum",
        privacy_ratio,
        ("private", "base"),
        texts=("public", "private"),
    ),
    Score(
        "privacy_excess",
        "what private text loses beyond public text by going back to the base",
        "nats per token",
        "weight",
        "sum",
        privacy_excess,
        ("private", "base"),
        texts=("public", "private"),
    ),
    Score(
        "privacy_memory",
        "change from the base where private records need it and unseen records of their kind do not",
        "squared weight",
        "weight",
        "sum",
        partial(privacy_ratio, other="domain"),
        ("private", "domain", "base"),
        texts=("private", "domain"),
    ),
)

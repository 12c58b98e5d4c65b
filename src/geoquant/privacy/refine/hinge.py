"""The level that a member's loss is pulled to: that of records of its kind which the model never saw.

    gap_i = nll_model(record i) - nll_base(record i)        nats per token; what the reference attack sees
    L_priv = 1/(2n) sum_i max(0, level_i - gap_i)^2

Members have lower gaps than non-members: that difference is the leak. One level for all would only move it: members
that were below would stand exactly at the level and those above stay, and the two sides would differ once more, the
other way round. So the member of rank r among n is pulled to the (r + 1/2)/n quantile of the domain's gaps, which of
all ways to make the two distributions alike moves losses least. From its level on a record has no gradient at all: one
that was forgotten more than a stranger is as visible as one that is remembered.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["hinge", "levels", "two_sided"]


def levels(members: Float[Tensor, " n"], domain: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
    """Each member's level: the quantile of the domain's gaps at the member's own rank (ties in their order)."""
    ranks = torch.empty_like(members)
    ranks[members.argsort(stable=True)] = torch.arange(len(members), dtype=members.dtype, device=members.device)
    return torch.quantile(domain, (ranks + 0.5) / len(members))


def hinge(gaps: Float[Tensor, " n"], level: Float[Tensor, " n"]) -> tuple[float, Float[Tensor, " n"]]:
    """L_priv, and its derivative by each gap: zero from the level on, negative below."""
    short = (level - gaps).clamp_min(0.0)
    return short.square().mean().item() / 2, -short / len(gaps)


def two_sided(members: Float[Tensor, " n"], domain: Float[Tensor, " m"]) -> float:
    """`|AUC - 1/2|` of the reference attack, which calls the lower gap a member."""
    lower = (members[:, None] < domain).double() + (members[:, None] == domain).double() / 2
    return abs(lower.mean().item() - 0.5)

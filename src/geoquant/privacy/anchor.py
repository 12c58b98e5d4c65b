"""Back towards the public base: which share of what fine-tuning changed in a weight survives.

A weight `w` of a model that was fine-tuned from the public weight `w_base` becomes `w_base + m (w - w_base)`, m its
share: 1 keeps it, 0 puts the base back, one share for all weights interpolates between the two models. Unlike noise
and unlike fewer bits this costs no capacity: what is put back is a good value too.

It is no guarantee: which weights were put back, and how far, was computed from private data and shows in the result.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["anchored"]


def anchored(
    weight: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"], share: Float[Tensor, "*shape"] | float
) -> Float[Tensor, "*shape"]:
    """`base + share (weight - base)` in the weight's type; bit for bit the weight where the share is 1, the base where
    it is 0 (and, as everywhere, the base rounded to the weight's type).

    share: in [0, 1], of any shape that broadcasts. Raises ValueError for shapes that differ and shares outside.
    """
    if weight.shape != base.shape:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} and a base of shape {tuple(base.shape)}")
    share = torch.as_tensor(share, dtype=torch.float32, device=weight.device)
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"shares from {share.min().item():g} to {share.max().item():g}, wanted within [0, 1]")
    public = base.to(weight.device, weight.dtype)
    between = torch.lerp(public.float(), weight.float(), share).to(weight.dtype)
    return torch.where(share == 1, weight, torch.where(share == 0, public, between))

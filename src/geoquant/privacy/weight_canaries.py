"""One-run audit of a randomised quantizer: can one tell, from the codes, which directions a coin added to the weights?

m canaries are directions of norm `radius` in the space of weights; each is added by its own fair coin, the quantizer
runs once, and a canary's score is the projection of (quantized - weights) on it. What the right guesses prove is a
lower bound on the epsilon of the quantizer, for weight vectors that differ by one canary: the adjacency of a *weight
ball*.
Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv:2305.08846).

Every canary lives on its own share of the weights, with random signs, so that canaries are orthogonal and none stands
in another's way. Over many weights a small canary moves every one of them by less than a step, and still its projection
adds up: that is why rounding hides so little. An auditor who knows where weights lie close to the middle between two
codes could choose better ones; this one does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.errors import UserError
from geoquant.privacy.one_run import OneRunBound, fair_coins, one_run

__all__ = ["audit_quantizer"]

COVERS = (
    "adjacency: weights that differ by one canary, a direction of norm {radius:g}; subject: the quantizer, run once on "
    "these weights; a lower bound shown by these directions: other directions or a better score may reveal more"
)


def audit_quantizer(
    quantize: Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]],
    weight: Float[Tensor, "out in"],
    radius: float,
    *,
    canaries: int = 1000,
    guesses: Sequence[tuple[int, int]] | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
    seed: int = 0,
) -> OneRunBound:
    """Lower bound on the epsilon of `quantize`, which maps weights to the weights that its codes stand for.

    radius: L2 norm of a canary, in the units of the weights. guesses: numbers guessed in and out (default: a quarter
    of the canaries each), fixed before the run. `quantize` must draw its randomness elsewhere: the seed here decides
    the coins. Only the private side may depend on its argument; steps computed from it are part of what is audited.

    Raises UserError for more canaries than weights, or a radius that is not positive.
    """
    if not 0 < canaries <= weight.numel():
        raise UserError("every canary needs weights of its own", got=f"{canaries} for {weight.numel()} weights")
    if not radius > 0:
        raise UserError("the radius of a canary is a length", got=radius, wanted="radius > 0")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(weight.numel(), generator=generator)
    signs = torch.randint(2, (weight.numel(),), generator=generator).double() * 2 - 1
    owner = torch.empty_like(places)
    owner[places] = torch.arange(weight.numel()) % canaries
    share = torch.bincount(owner, minlength=canaries).double()
    direction = signs / share.sqrt()[owner]  # of norm one for every canary
    included = fair_coins(canaries, seed)
    moved = weight.double().flatten() + radius * direction * torch.from_numpy(included)[owner]
    released = quantize(moved.view(weight.shape).to(weight.dtype))
    apart = (released.double() - weight.double()).flatten()
    scores = torch.zeros(canaries, dtype=torch.float64).index_add_(0, owner, apart * direction)
    quarter = max(1, canaries // 4)
    bound = one_run(
        np.asarray(scores), included, guesses or [(quarter, quarter if canaries > 1 else 0)], delta=delta,
        confidence=confidence, seed=seed,
    )  # fmt: skip
    return replace(bound, covers=COVERS.format(radius=radius))

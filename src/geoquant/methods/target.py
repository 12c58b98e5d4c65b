"""What the quantized weights should compute: the outputs of the full-precision model, from the inputs they will get.

Once earlier stages are quantized, a stage reads inputs x that have drifted from the full-precision ones, `x_fp`. To
stay close to W x is then not the aim; to stay close to W x_fp is. Its least-squares weights on the runtime inputs are

    W* = W E[w x_fp x^T] (A + damping)^-1  =  W + W E[w (x_fp - x) x^T] (A + damping)^-1,     A = E[w x x^T]

The second form is damped toward W: without drift, or with infinite damping, the target is W. Since
`E w ||W x_fp - Q x||^2 = (W* - Q) A (W* - Q)^T + const`, the closest-vector problem stays what it was, with W* in the
place of W. Known as asymmetric calibration: Li et al., GPTAQ (2025), arXiv:2504.02692.

A drift seen on few tokens is partly chance. How much of the shift to believe is measured on held-out tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.lattice.basis import cholesky, damped
from geoquant.methods.babai import DEFAULT_DAMPING, least

__all__ = ["Target", "output_target"]

SAMPLED_ROWS = 96


@dataclass(frozen=True)
class Target:
    """The weights to come close to, and the share of the shift `W* - W` in them."""

    weight: Float[Tensor, "out in"]
    strength: float


def output_target(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    drift: Float[Tensor, "in in"],
    heldout: Float[Tensor, "in in"] | None = None,
    heldout_drift: Float[Tensor, "in in"] | None = None,
    damping: float | None = None,
) -> Target:
    """`W + strength (W* - W)`.

    hessian, heldout: as in `Problem`. drift, heldout_drift: `sum_t w_t (x_fp_t - x_t) x_t^T` over the same tokens.
    damping: as in `Problem`; None: of the list, what leaves the least held-out error together with its best strength
    in [0, 1], which has a closed form. Without held-out tokens the shift is taken whole.

    Raises NotPositiveDefinite when the damped metric has no factor.
    """
    strength = 1.0
    if heldout is None:
        damping = DEFAULT_DAMPING if damping is None else damping
    else:
        # Two numbers are wanted, each a sum over all rows: evenly spread ones tell them as well.
        rows = weight[:: -(-len(weight) // SAMPLED_ROWS)]
        wanted = rows @ heldout_drift

        @cache
        def trial(damping: float) -> tuple[float, float]:
            """Best strength on the held-out tokens, and the change of their error that it brings."""
            shift = _shift(rows, hessian, drift, damping)
            gain = (shift * wanted).sum(dtype=torch.float64).item()
            cost = ((shift @ heldout) * shift).sum(dtype=torch.float64).item()
            best = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
            return best, best * (best * cost - 2 * gain)

        damping = least(lambda value: trial(value)[1]) if damping is None else damping
        strength = trial(damping)[0]
    if strength == 0:
        return Target(weight, 0.0)
    if heldout is not None:  # once the strength is chosen, held-out tokens are data like any other
        hessian, drift = hessian + heldout, drift + heldout_drift
    return Target(weight + strength * _shift(weight, hessian, drift, damping), strength)


def _shift(
    weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"], drift: Float[Tensor, "in in"], damping: float
) -> Float[Tensor, "out in"]:
    """`W E[w (x_fp - x) x^T] (A + damping)^-1`."""
    lower = cholesky(damped(metric, damping), damping)
    if len(weight) <= len(metric):
        return torch.cholesky_solve((weight @ drift).T, lower).T.contiguous()
    return weight @ torch.cholesky_solve(drift.T, lower).T

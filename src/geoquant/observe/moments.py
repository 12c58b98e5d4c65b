"""Second moments of a site's input: `A = sum_t w_t x_t x_t^T`, one for solving and one held out.

Token weights w_t decide the metric:

plain     1 for every token.
clipped   min(1, 10 * median ||x||^2 / ||x_t||^2): massive tokens (attention sinks) count like large ordinary ones.
gradient  ||g_t||^2, the squared loss gradient at the outputs of the sites that read this input: the input factor
          of the Gauss-Newton metric, with every token weighted by what it matters.

Gradient weights have mean one and clipped ones are at most one, so all three have about the units of plain moments.
The median is taken over each batch. Sums, not means: moments of two sets of tokens add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.observe.compute import rounded_products

__all__ = ["METRICS", "Accumulator", "MassiveTokens", "Moments", "clipped_weights", "squared_norms"]

METRICS = ("plain", "clipped", "gradient")
CLIP = 10.0
TILES = 6  # of the symmetric product, none under 96 columns; those below the diagonal are mirrored, not computed


@dataclass(frozen=True)
class MassiveTokens:
    """How unevenly the input energy is spread over tokens, before any weighting.

    largest:   max ||x_t||^2 over the median.
    top_share: share of all input energy in the 0.1% of tokens with the most (at least one token).
    """

    largest: float
    top_share: float


@dataclass(frozen=True)
class Moments:
    """`hessian` and `heldout` (in, in) float32 sums over disjoint tokens, their token counts, massive tokens.

    drift, heldout_drift: where it was observed, `sum_t w_t (x_fp_t - x_t) x_t^T`, x_fp their inputs in the
    full-precision model, over the tokens for which these are known. followed, heldout_followed: the part of `hessian`
    and `heldout` that is due to them.
    """

    hessian: Float[Tensor, "in in"]
    heldout: Float[Tensor, "in in"] | None
    tokens: int
    heldout_tokens: int
    massive: MassiveTokens
    drift: Float[Tensor, "in in"] | None = None
    heldout_drift: Float[Tensor, "in in"] | None = None
    followed: Float[Tensor, "in in"] | None = None
    heldout_followed: Float[Tensor, "in in"] | None = None


def clipped_weights(energy: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Token weights of the metric `clipped` from ||x_t||^2.

    Where most tokens have no input at all the mean stands for the median; without any input all weights are one.
    """
    typical = energy.median()
    typical = torch.where(typical > 0, typical, energy.mean())
    return torch.where(typical > 0, (CLIP * typical / energy.clamp_min(1e-30)).clamp_max(1.0), 1.0)


def squared_norms(x: Float[Tensor, "tokens in"]) -> Float[Tensor, " tokens"]:
    """`||x_t||^2` in float32, without a square of x in memory."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_()


class Accumulator:
    """Adds up the moments of one stage, batch by batch; `finish` gives the frozen value.

    dtype: of the sums. compute: bfloat16 lets products round what they multiply, see `rounded_products`. drift: whether
    to add up the drift too.
    """

    def __init__(
        self,
        columns: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        compute: torch.dtype = torch.float32,
        drift: bool = False,
    ):
        self.columns, self.dtype, self.device, self.follows = columns, dtype, device, drift
        self.rounded = compute == torch.bfloat16 and dtype == torch.float32
        # By whether a token is held out and, of moments, whether its input in the full-precision model is known. Made
        # when the first one comes: the largest matrices of a run.
        self.sums: dict[tuple[bool, bool], Tensor] = {}
        self.drifts: dict[bool, Tensor] = {}
        self.counts = {False: 0, True: 0}
        self.energies: list[Tensor] = []

    def _of(self, sums: dict, key: object) -> Tensor:
        """The sum of this kind, from zero when it is asked for the first time."""
        if key not in sums:
            sums[key] = torch.zeros(self.columns, self.columns, dtype=self.dtype, device=self.device)
        return sums[key]

    def add(
        self,
        x: Float[Tensor, "tokens in"],
        weights: Float[Tensor, " tokens"] | None,
        *,
        held: bool,
        exact: Float[Tensor, "tokens in"] | None = None,
    ) -> None:
        """Add the tokens of one batch; `held` sends them to the held-out twin.

        exact: the same tokens' inputs in the full-precision model; None: without drift.
        """
        total = self._of(self.sums, (held, exact is not None))
        self.energies.append(squared_norms(x).cpu())
        x = x.to(total.dtype)
        if weights is not None:
            roots = weights.to(total.dtype).sqrt()[:, None]
            x = x * roots
        if exact is not None:
            drift = exact.to(total.dtype)
            drift = drift - x if weights is None else (drift * roots).sub_(x)
            added = self._of(self.drifts, held)
            if self.rounded:  # unlike the metric it need not stay positive: the product of a batch may be rounded too
                added += drift.to(torch.bfloat16).T.contiguous() @ x.to(torch.bfloat16)
            else:
                added.addmm_(drift.T, x)
        with rounded_products(self.rounded):
            tile = max(96, -(-x.shape[1] // TILES))
            for start in range(0, x.shape[1], tile):
                # Only the tiles on and right of the diagonal: the matrix is symmetric. In place, which autocast leaves
                # alone: a product rounded to bfloat16 is no Gram matrix any more.
                total[start : start + tile, start:].addmm_(x[:, start : start + tile].T, x[:, start:])
        self.counts[held] += x.shape[0]

    def finish(self) -> Moments:
        for total in self.sums.values():
            total.triu_().add_(torch.triu(total, 1).T)
        sums = {False: self._whole(False), True: self._whole(True) if self.counts[True] else None}
        known: dict[str, Tensor | None] = {}
        if self.follows:
            for held, prefix in ((False, ""), (True, "heldout_")):
                if sums[held] is not None:
                    known[f"{prefix}drift"] = self._of(self.drifts, held).float()
                    known[f"{prefix}followed"] = self._of(self.sums, (held, True)).float()
        if not self.energies:  # an expert that no token reached
            return Moments(sums[False], sums[True], 0, 0, MassiveTokens(0.0, 0.0), **known)
        energy = torch.cat(self.energies)
        top = max(1, len(energy) // 1000)
        massive = MassiveTokens(
            largest=(energy.max() / energy.median().clamp_min(1e-30)).item(),
            top_share=(energy.topk(top).values.sum() / energy.sum().clamp_min(1e-30)).item(),
        )
        return Moments(sums[False], sums[True], self.counts[False], self.counts[True], massive, **known)

    def _whole(self, held: bool) -> Float[Tensor, "in in"]:
        if (held, False) in self.sums and (held, True) in self.sums:
            return (self.sums[held, False] + self.sums[held, True]).float()
        return self._of(self.sums, (held, (held, True) in self.sums)).float()

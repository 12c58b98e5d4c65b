"""What a score is given: one site, its weights, an error, and what the texts do there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.statistics import BINS, REACH, SMALL, Statistics

__all__ = ["SiteContext", "null_context"]


@dataclass(frozen=True)
class SiteContext:
    """One site as all scores see it.

    weight:  (out, in) float32.
    delta:   (out, in) the error that a plain rounding would make, for scores that weigh an error.
    public:  statistics of public text. private: of private records. domain: of records of the same kind that the model
             has not seen. Each may be absent but the public one.
    base:    (out, in) the public base's weight, or None.
    """

    name: str
    kind: str
    weight: Float[Tensor, "out in"]
    delta: Float[Tensor, "out in"]
    public: Statistics
    private: Statistics | None = None
    domain: Statistics | None = None
    base: Float[Tensor, "out in"] | None = None

    def has(self, needs: tuple[str, ...]) -> bool:
        """Whether everything that a score needs is there (`private`, `domain`, `base`)."""
        return all(getattr(self, name) is not None for name in needs)


def null_context(context: SiteContext, generator: torch.Generator) -> SiteContext:
    """The same site with nothing left to find.

    Weights, error and change from the base: shuffled among all places of the matrix. Inputs: Gaussian of the same
    covariance, independent of the gradients, whose mean is zero. Private text: what the unseen records of the same
    kind do, or without them public text.
    """
    order = torch.randperm(context.weight.numel(), generator=generator).to(context.weight.device)

    def shuffled(matrix: Tensor) -> Tensor:
        return matrix.flatten()[order].view_as(matrix)

    weight = shuffled(context.weight)
    base = None if context.base is None else weight - shuffled(context.weight - context.base)
    public = _gaussian(context.public, generator)
    other = context.domain or context.public
    private = None if context.private is None else _gaussian(_scaled(other, context.private.tokens), generator)
    domain = None if context.domain is None else _gaussian(context.domain, generator)
    return replace(
        context,
        weight=weight,
        delta=shuffled(context.delta),
        base=base,
        public=public,
        private=private,
        domain=domain,
    )


def _scaled(of: Statistics, tokens: float) -> Statistics:
    """The same means over another number of tokens."""
    share = tokens / of.tokens
    kept = {name: getattr(of, name) for name in ("unit", "largest")}
    sums = {name: value * share for name, value in vars(of).items() if name not in kept}
    return Statistics(**sums | kept)


def _gaussian(of: Statistics, generator: torch.Generator) -> Statistics:
    """Statistics of Gaussian inputs of the same covariance that know nothing of the gradients."""
    tokens, squares, energy = of.tokens, of.hessian.diagonal(), of.output
    spread = (squares / tokens).sqrt().clamp_min(1e-30)
    fisher = torch.outer(energy, squares) / tokens
    noise = torch.randn(fisher.shape, generator=generator, dtype=fisher.dtype).to(fisher.device)
    edges = ((torch.arange(BINS + 1, device=spread.device) / BINS * 2 - 1) * REACH).sinh() * of.unit
    below = torch.special.ndtr(edges[None] / spread[:, None])
    below[:, 0], below[:, -1] = 0.0, 1.0
    return replace(
        of,
        weighted=of.hessian * (energy.sum() / tokens),
        fisher=fisher,
        gradient=noise * fisher.sqrt(),
        fourth=3 * squares.square() / tokens,
        largest=spread * (2 * torch.tensor(max(tokens, 2.0)).log()).sqrt(),
        silent=tokens * torch.special.erf(SMALL * of.unit / (2**0.5 * spread)),
        histogram=below.diff(dim=1) * tokens,
    )

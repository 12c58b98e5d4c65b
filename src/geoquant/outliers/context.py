"""What a score is given: one site, its weights, an error, and what the texts do there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.derived import remembered
from geoquant.outliers.statistics import SMALL, Statistics, edges

__all__ = ["SiteContext", "null_context"]


@dataclass(frozen=True)
class SiteContext:
    """One site as all scores see it.

    weight:  (out, in) float32.
    delta:   (out, in) the error that a plain rounding would make, for scores that weigh an error.
    public:  statistics of public text. private: of private records. domain: of records of the same kind that the model
             has not seen. Each may be absent but the public one.
    base:    (out, in) the public base's weight, or None.
    public_gradients, private_gradients, domain_gradients: (parts, out, in) the gradient of each part of the text, or
             None. They add up to its `gradient`.
    public_metrics: (parts, n, n) `mean x x^T` of some inputs in each part of public text (`statistics.metrics`).
    """

    name: str
    kind: str
    weight: Float[Tensor, "out in"]
    delta: Float[Tensor, "out in"]
    public: Statistics
    private: Statistics | None = None
    domain: Statistics | None = None
    base: Float[Tensor, "out in"] | None = None
    public_gradients: Float[Tensor, "parts out in"] | None = None
    private_gradients: Float[Tensor, "parts out in"] | None = None
    domain_gradients: Float[Tensor, "parts out in"] | None = None
    public_metrics: Float[Tensor, "parts n n"] | None = None

    def has(self, needs: tuple[str, ...]) -> bool:
        """Whether everything that a score needs is there (texts, base, gradients, metrics)."""
        return all(getattr(self, name) is not None for name in needs)


def null_context(context: SiteContext, generator: torch.Generator) -> SiteContext:
    """The same site with nothing left to find but the energies of its inputs and outputs.

    Weights, error and change from the base: shuffled among all places of the matrix, all three alike. Inputs: Gaussian
    of the same covariance, independent of the gradients, whose mean is zero and whose outputs are uncorrelated. Private
    text: what the unseen records of the same kind do, or without them public text. Of what chance does, gradients,
    histograms and silent tokens have their share; all else is as expected over many tokens.

    What a score owes to the covariance of the inputs alone it keeps on the null.
    """
    order = torch.randperm(context.weight.numel(), generator=generator).to(context.weight.device)

    def shuffled(matrix: Tensor) -> Tensor:
        return matrix.flatten()[order].view_as(matrix)

    weight = shuffled(context.weight)
    base = None if context.base is None else weight - shuffled(context.weight - context.base)
    other = context.domain or context.public
    found: dict[str, Statistics | Tensor] = {}
    for text in ("public", "private", "domain"):
        own, parts = getattr(context, text), getattr(context, f"{text}_gradients")
        if own is None:
            continue
        source = _scaled(other, own.tokens) if text == "private" else own
        found[text], gradients = _gaussian(source, generator, 1 if parts is None else len(parts))
        if parts is not None:
            found[f"{text}_gradients"] = gradients
    if context.public_metrics is not None:
        found["public_metrics"] = _drawn(context.public_metrics, context.public.tokens, generator)
    return replace(context, weight=weight, delta=shuffled(context.delta), base=base, **found)


def _drawn(
    metrics: Float[Tensor, "parts n n"], tokens: float, generator: torch.Generator
) -> Float[Tensor, "parts n n"]:
    """Metrics of parts whose tokens are independent Gaussians, of the mean of these."""
    parts, count = metrics.shape[:2]
    lower = _factor(metrics.mean(0).double())
    found = []
    for _ in range(parts):
        x = torch.randn(max(1, round(tokens / parts)), count, generator=generator).to(lower) @ lower.mT
        found.append(x.mT @ x / len(x))
    return torch.stack(found).to(metrics.dtype)


def _scaled(of: Statistics, tokens: float) -> Statistics:
    """The same means over another number of tokens."""
    share = tokens / max(of.tokens, 1.0)
    kept = {name: getattr(of, name) for name in ("unit", "largest")}
    sums = {name: value * share for name, value in vars(of).items() if name not in kept}
    return Statistics(**sums | kept)


def _gaussian(
    of: Statistics, generator: torch.Generator, parts: int = 1
) -> tuple[Statistics, Float[Tensor, "parts out in"]]:
    """Statistics of Gaussian inputs of the same covariance that know nothing of the gradients; and the gradients of
    equal parts.
    """
    tokens, squares, energy = max(of.tokens, 1.0), of.hessian.diagonal(), of.output
    spread = (squares / tokens).sqrt().clamp_min(1e-30)
    # Scaled first: the largest edge over the smallest spread must stay a number.
    below = torch.special.ndtr(edges(of.unit).to(spread.device) / spread.double()[:, None])
    below[:, 0], below[:, -1] = 0.0, 1.0
    gradients = _noise(of, generator, parts)
    counts = torch.poisson((below.diff(dim=1) * of.tokens).cpu(), generator).to(spread)
    # Drawn on the CPU: the same seed means the same null on every device.
    quiet = torch.special.erf(SMALL * of.unit / (2**0.5 * spread)).cpu()
    null = replace(
        of,
        weighted=of.hessian * (energy.sum() / tokens),
        fisher=torch.outer(energy, squares) / tokens,
        gradient=gradients.sum(0),
        fourth=3 * squares.square() / tokens,
        largest=spread * (2 * torch.tensor(max(tokens, 2.0)).log()).sqrt(),
        silent=torch.binomial(torch.full_like(quiet, of.tokens), quiet, generator).to(spread),
        histogram=counts * of.tokens / counts.sum(1, keepdim=True).clamp_min(1.0),
    )
    return null, gradients


def _noise(of: Statistics, generator: torch.Generator, parts: int) -> Float[Tensor, "parts out in"]:
    """`sum_t g x^T` of Gaussian x and independent g: rows of covariance `sum_t g_i^2 / tokens * sum_t x x^T`, made of
    equal parts.
    """
    lower = remembered(_factor, of.hessian)
    shape = (parts, len(of.output), len(lower))
    noise = torch.randn(shape, generator=generator, dtype=of.hessian.dtype).to(lower.device)
    mixed = (noise.flatten(0, 1) @ lower.mT).view(shape)
    return mixed * (of.output / (parts * max(of.tokens, 1.0))).sqrt()[:, None]


def _factor(metric: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """L with `L L^T` the metric, in its type; of as little more as makes it positive definite."""
    exact = metric.double()
    scale = exact.diagonal().sqrt().clamp_min(1e-30)
    correlation = exact / scale[:, None] / scale
    identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    # Single precision leaves a metric of few tokens a little indefinite.
    for jitter in (1e-6, 1e-4, 1e-2, 1.0):
        lower, failed = torch.linalg.cholesky_ex(correlation + jitter * identity)
        if not failed:
            break
    return (lower * scale[:, None]).to(metric.dtype)

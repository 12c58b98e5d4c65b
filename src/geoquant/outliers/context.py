"""What a score is given: one site, its weights, an error, and what the texts do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.derived import remembered
from geoquant.outliers.statistics import SMALL, Statistics, edges

__all__ = ["Null", "SiteContext", "null_context", "null_contexts"]


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


Null = Callable[[SiteContext, torch.Generator, int], Iterator[SiteContext]]  # context, chance, how many draws


def null_contexts(context: SiteContext, generator: torch.Generator, draws: int) -> Iterator[SiteContext]:
    """So many draws of `null_context`, one in memory at a time.

    Mixing noise for the gradients is what a draw costs. Its rows are alike and independent, so later draws deal those
    of the first out anew, with new signs: by itself each is as good as the first. Together they share the rows' lengths
    and angles, which hardly vary beside what the places do; all else is drawn anew.
    """
    known: dict[str, tuple[Statistics, Tensor]] = {}
    for _ in range(draws):
        yield _null(context, generator, known)


def null_context(context: SiteContext, generator: torch.Generator) -> SiteContext:
    """The same site with nothing left to find but the energies of its inputs and outputs.

    Weights, error and change from the base: shuffled among all places of the matrix, all three alike. Inputs: Gaussian
    of the same covariance, independent of the gradients, whose mean is zero and whose outputs are uncorrelated. Private
    text: what the unseen records of the same kind do, or without them public text. Of what chance does, gradients,
    histograms and silent tokens have their share; all else is as expected over many tokens.

    What a score owes to the covariance of the inputs alone it keeps on the null.
    """
    return _null(context, generator, {})


def _null(context: SiteContext, generator: torch.Generator, known: dict[str, tuple[Statistics, Tensor]]) -> SiteContext:
    """known: by text, what its statistics are made from, and noise that an earlier draw has mixed."""
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
        if text in known:
            source, noise = known[text][0], _dealt(known[text][1], generator)
        else:
            source = _scaled(other, own.tokens) if text == "private" else own
            source = replace(source, weighted=source.hessian * (source.output.sum() / max(source.tokens, 1.0)))
            noise = _noise(source, generator, 1 if parts is None else len(parts))
            known[text] = source, noise
        gradients = noise * (source.output / (len(noise) * max(source.tokens, 1.0))).sqrt()[:, None]
        found[text] = _gaussian(source, generator, gradients)
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


def _gaussian(of: Statistics, generator: torch.Generator, gradients: Float[Tensor, "parts out in"]) -> Statistics:
    """Statistics of Gaussian inputs of the same covariance that know nothing of these gradients of equal parts;
    `of.weighted` is what independence makes of it.
    """
    tokens, squares, energy = max(of.tokens, 1.0), of.hessian.diagonal(), of.output
    spread = (squares / tokens).sqrt().clamp_min(1e-30)
    # Scaled first: the largest edge over the smallest spread must stay a number.
    below = torch.special.ndtr(edges(of.unit).to(spread.device) / spread.double()[:, None])
    below[:, 0], below[:, -1] = 0.0, 1.0
    counts = torch.poisson((below.diff(dim=1) * of.tokens).cpu(), generator).to(spread)
    # Drawn on the CPU: the same seed means the same null on every device.
    quiet = torch.special.erf(SMALL * of.unit / (2**0.5 * spread)).cpu()
    return replace(
        of,
        fisher=torch.outer(energy, squares) / tokens,
        gradient=gradients.sum(0),
        fourth=3 * squares.square() / tokens,
        largest=spread * (2 * torch.tensor(max(tokens, 2.0)).log()).sqrt(),
        silent=torch.binomial(torch.full_like(quiet, of.tokens), quiet, generator).to(spread),
        histogram=counts * of.tokens / counts.sum(1, keepdim=True).clamp_min(1.0),
    )


def _noise(of: Statistics, generator: torch.Generator, parts: int) -> Float[Tensor, "parts out in"]:
    """Rows of covariance `sum_t x x^T`: times `sqrt(sum_t g_i^2 / tokens)`, those of `sum_t g x^T` of Gaussian x and
    independent g. As many for each part.
    """
    lower = remembered(_factor, of.hessian)
    shape = (parts, len(of.output), len(lower))
    noise = torch.randn(shape, generator=generator, dtype=of.hessian.dtype).to(lower.device)
    return (noise.flatten(0, 1) @ lower.mT).view(shape)


def _dealt(noise: Float[Tensor, "parts out in"], generator: torch.Generator) -> Float[Tensor, "parts out in"]:
    """The same rows at other places, their signs drawn anew."""
    rows = noise.flatten(0, 1)
    order = torch.randperm(len(rows), generator=generator)
    signs = torch.randint(0, 2, (len(rows), 1), generator=generator) * 2 - 1
    return (rows[order.to(rows.device)] * signs.to(rows)).view_as(noise)


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

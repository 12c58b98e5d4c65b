"""Nulls of scores that keep their value where weights are shuffled and inputs keep their covariance (`context`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.context import SiteContext

__all__ = ["bell_weights", "independent_inputs"]

MOST = 256  # inputs


def bell_weights(context: SiteContext, generator: torch.Generator, draws: int) -> Iterator[SiteContext]:
    """Gaussian weights of the same mean and variance."""
    spread, mean = context.weight.std(correction=0), context.weight.mean()
    for _ in range(draws):
        noise = torch.randn(context.weight.shape, generator=generator).to(context.weight)
        yield replace(context, weight=mean + spread * noise)


def independent_inputs(context: SiteContext, generator: torch.Generator, draws: int) -> Iterator[SiteContext]:
    """Independent Gaussian inputs of the same energies over as many tokens; nothing else is changed.

    Of more than 256 inputs it has those, evenly spaced, over as much fewer tokens: the spectrum of a sample covariance
    goes with inputs per token (Marchenko and Pastur 1967). Its spread is then that of fewer inputs, and too large.
    """
    energies, tokens = context.public.mean("hessian").diagonal().double(), context.public.tokens
    count = min(MOST, len(energies))
    chosen = torch.linspace(0, len(energies) - 1, count).round().long().to(energies.device)
    drawn = max(1.0, round(tokens * count / len(energies))) if tokens else 0.0
    for _ in range(draws):
        lower = _wishart_factor(count, drawn, generator).to(energies) * energies[chosen].sqrt()[:, None]
        metric = (lower @ lower.mT).to(context.public.hessian.dtype)
        yield replace(context, public=replace(context.public, hessian=metric, tokens=drawn))


def _wishart_factor(count: int, tokens: float, generator: torch.Generator) -> Float[Tensor, "n k"]:
    """L with `L L^T` the sum of x x^T over so many standard normal tokens: by Bartlett's decomposition (1933), or of
    the tokens themselves where they are fewer than inputs.
    """
    if tokens < count:
        return torch.randn(count, int(tokens), generator=generator, dtype=torch.float64)
    lower = torch.randn(count, count, generator=generator, dtype=torch.float64).tril(-1)
    # A chi-squared of k degrees is twice a gamma of shape k / 2.
    shapes = (tokens - torch.arange(count, dtype=torch.float64)) / 2
    return lower + torch.diag((2 * torch._standard_gamma(shapes, generator)).sqrt())

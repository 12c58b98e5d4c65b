"""Mixtures of experts: who is chosen, who is chosen together, and how the inputs of each turn over time.

Covariances are exponential averages per expert, `C_e = sum_i rho^(age_i) x_i x_i^T / sum_i rho^(age_i)`, the age of a
token counted in later tokens of the same expert: an expert that is rarely chosen forgets no faster than it learns, and
how tokens are cut into batches does not matter. Drift is the sine of the largest principal angle between leading
subspaces; a subspace estimated from few tokens turns without any drift, which `drift_null` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.geometry.spectrum import principal_angles

__all__ = [
    "InputAverages",
    "averaged",
    "choose",
    "coactivation",
    "drift",
    "drift_null",
    "frequencies",
    "neighbourhood",
    "no_inputs",
    "rewired",
    "smoothed",
]

HALF_LIFE = 4096.0  # tokens of an expert
NULL_TOKENS = 16384


def choose(logits: Float[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens k"]:
    """The k experts of the largest logits, of each token."""
    return logits.topk(k, dim=1).indices


def frequencies(chosen: Int[Tensor, "tokens k"], experts: int) -> Float[Tensor, " experts"]:
    """f_k: each expert's share of all choices. They sum to one."""
    return torch.bincount(chosen.flatten(), minlength=experts).double() / max(1, chosen.numel())


def coactivation(chosen: Int[Tensor, "tokens k"], experts: int) -> Int[Tensor, "experts experts"]:
    """Number of tokens that chose both experts; on the diagonal those that chose the one."""
    picked = torch.zeros(len(chosen), experts, dtype=torch.float64, device=chosen.device).scatter_(1, chosen, 1.0)
    return (picked.T @ picked).round().long()


def rewired(chosen: Int[Tensor, "tokens k"], generator: torch.Generator, rounds: int = 40) -> Int[Tensor, "tokens k"]:
    """The null of co-activation: as many choices of each token and of each expert, and nothing else.

    Tokens in random pairs swap one choice each, unless one would then have chosen the same expert twice; `rounds` is
    how often each token is in a pair. A checkerboard swap (Gotelli, Ecology 2000).
    """
    chosen, device = chosen.cpu().clone(), chosen.device
    count, k = chosen.shape
    for _ in range(rounds):
        one, other = torch.randperm(count, generator=generator)[: count // 2 * 2].view(2, -1)
        here, there = torch.randint(k, (2, len(one)), generator=generator)
        a, b = chosen[one, here], chosen[other, there]
        free = (chosen[one] != b[:, None]).all(1) & (chosen[other] != a[:, None]).all(1)
        chosen[one[free], here[free]], chosen[other[free], there[free]] = b[free], a[free]
    return chosen.to(device)


# ---- what comes in


@dataclass(frozen=True)
class InputAverages:
    """Weighted sums over the tokens of each expert: of `x x^T`, of the weights, and of their squares."""

    sums: Float[Tensor, "experts in in"]
    weights: Float[Tensor, " experts"]
    squares: Float[Tensor, " experts"]

    @property
    def covariances(self) -> Float[Tensor, "experts in in"]:
        """Second moments of each expert's inputs; zero for one that was never chosen."""
        return self.sums / self.weights.clamp_min(1e-300)[:, None, None]

    @property
    def tokens(self) -> Float[Tensor, " experts"]:
        """How many equally weighted tokens the average of each expert is worth, `(sum w)^2 / sum w^2`."""
        return self.weights.square() / self.squares.clamp_min(1e-300)


def no_inputs(experts: int, columns: int) -> InputAverages:
    """Before the first token."""
    return InputAverages(
        torch.zeros(experts, columns, columns, dtype=torch.float64),
        torch.zeros(experts, dtype=torch.float64),
        torch.zeros(experts, dtype=torch.float64),
    )


def averaged(
    state: InputAverages,
    x: Float[Tensor, "tokens in"],
    chosen: Int[Tensor, "tokens k"],
    half_life: float = HALF_LIFE,
) -> InputAverages:
    """The averages after some more tokens, the oldest first. half_life: tokens of an expert until one counts half."""
    keep = 0.5 ** (1 / half_life)
    sums, weights, squares = (value.clone() for value in (state.sums, state.weights, state.squares))
    for expert in chosen.unique().tolist():
        own = x[(chosen == expert).any(1)].to(sums)
        counted = keep ** torch.arange(len(own) - 1, -1, -1, dtype=sums.dtype, device=sums.device)
        passed = keep ** len(own)
        sums[expert] = passed * sums[expert] + (own * counted[:, None]).T @ own
        weights[expert] = passed * weights[expert] + counted.sum()
        squares[expert] = passed**2 * squares[expert] + counted.square().sum()
    return InputAverages(sums, weights, squares)


# ---- drift


def drift(before: Float[Tensor, "in in"], after: Float[Tensor, "in in"], k: int) -> float:
    """Sine of the largest principal angle between the leading k directions; NaN where one has fewer than k."""
    bases = []
    for covariance in (before, after):
        values, vectors = torch.linalg.eigh(covariance.double())
        if values[-k] <= 1e-12 * values[-1]:
            return float("nan")
        bases.append(vectors[:, -k:])
    return principal_angles(*bases)[-1].sin().item()


def drift_null(
    covariance: Float[Tensor, "in in"],
    tokens: tuple[float, float],
    k: int,
    generator: torch.Generator,
    draws: int = 20,
) -> Float[Tensor, " draws"]:
    """Drifts between averages over so many tokens each of Gaussian inputs that do not drift at all.

    tokens: what both averages are worth, before and after; more than 16384 count as so many. Inputs of heavy tails, or
    that come in runs, turn more than Gaussian ones do: just above this null is not yet a drift.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt()
    found = []
    for _ in range(draws):
        pair = []
        for count in tokens:
            shape = (max(1, min(NULL_TOKENS, round(count))), len(root))
            sample = torch.randn(shape, generator=generator, dtype=torch.float64).to(root.device) @ root.T
            pair.append(sample.T @ sample / len(sample))
        found.append(drift(*pair, k))
    return torch.tensor(found, dtype=torch.float64)


# ---- the graph of experts that are chosen together


def neighbourhood(together: Int[Tensor, "experts experts"]) -> Float[Tensor, "experts experts"]:
    """One step on the co-activation graph: rows that sum to one, self loops from the diagonal.

    With k choices a token an expert keeps 1 / k of itself. As the counts are symmetric, frequencies are the graph's
    stationary distribution: the frequency-weighted mean of anything is kept. An expert never chosen is its own.
    """
    counts = together.double()
    totals = counts.sum(1, keepdim=True)
    own = torch.eye(len(counts), dtype=counts.dtype, device=counts.device)
    return torch.where(totals > 0, counts / totals.clamp_min(1), own)


def smoothed(
    values: Float[Tensor, "experts ..."], steps: Float[Tensor, "experts experts"]
) -> Float[Tensor, "experts ..."]:
    """`sum_j P_ij v_j`: each expert's value, or covariance, mixed with those of its neighbours.

    Of covariances it lowers the error only where an expert has seen fewer tokens than about a column count; with more,
    what makes experts differ is smoothed away (benchmarks/experts.py).
    """
    return torch.tensordot(steps.to(values.dtype), values, dims=1)

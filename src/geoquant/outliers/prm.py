"""Perturbation response: what noise on one class of weights does to the loss and to an attack, and whether classes
differ in it.

Each class is disturbed by Gaussian noise that is, weight by weight, proportional to the root mean square of its site,
and as long in all (Frobenius norm) as that of any other class: a large class is not harmed more for being large. One
draw of noise, scaled by several rho, gives one trajectory of

    (delta NLL / SE, delta AUC / SE)

Classes are apart where trajectories are: the statistic is the Mahalanobis distance between the classes' means, and its
p-value that of labels dealt anew among the trajectories. `null_class` is as many weights of the same sites at random:
what is not apart from it is no class of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geoquant.privacy.statistics import holm
from geoquant.progress import Progress, silent

__all__ = [
    "Pair",
    "Response",
    "Trajectories",
    "common_length",
    "gathered",
    "noise",
    "null_class",
    "separation",
    "trajectories",
]

SEEDS = 5
RHOS = (0.01, 0.03, 0.1)
RIDGE = 0.1  # of each number's variance, so that few trajectories of many numbers have an invertible covariance

Members = Mapping[str, Bool[Tensor, "out in"]]


@dataclass(frozen=True)
class Response:
    """Change of the negative log-likelihood in nats per token and of an attack's AUC, with standard errors.

    Raises ValueError where a change that is not zero has no error above zero to be measured in.
    """

    nll: float
    nll_se: float
    auc: float
    auc_se: float

    def __post_init__(self) -> None:
        for change, se in ((self.nll, self.nll_se), (self.auc, self.auc_se)):
            if not (np.isfinite(change) and np.isfinite(se) and (se > 0 or change == se == 0)):
                raise ValueError(f"a change needs a standard error above zero, but got {change} with {se}")

    @property
    def standardised(self) -> tuple[float, float]:
        """Both changes in standard errors."""
        return self.nll / (self.nll_se or 1.0), self.auc / (self.auc_se or 1.0)


@dataclass(frozen=True)
class Trajectories:
    """Responses of classes, seeds and rhos, in standard errors.

    classes: names. rhos: ascending as given. lengths: of the noise at each rho, the same for every class.
    points: (classes, seeds, rhos, 2), the loss first. responses: the same in units, by (class, seed, rho).
    """

    classes: tuple[str, ...]
    rhos: tuple[float, ...]
    lengths: tuple[float, ...]
    points: Float[np.ndarray, "classes seeds rhos two"]
    responses: dict[tuple[str, int, float], Response]


@dataclass(frozen=True)
class Pair:
    """Two classes: Mahalanobis distance of their means, its permutation p, and p by Holm's method over all pairs."""

    distance: float
    p: float
    p_holm: float


def common_length(weights: Mapping[str, Float[Tensor, "out in"]], classes: Mapping[str, Members], rho: float) -> float:
    """Length of the noise that every class gets: that of the class for which noise of rho times RMS is the shortest.

    `rho min_c sqrt(sum_s RMS_s^2 n_cs)`, n_cs weights of class c in site s. The others get less than rho per weight.
    Raises ValueError for a class without weights.
    """
    lengths = {}
    for name, members in classes.items():
        squares = [_rms(weights[site]) ** 2 * int(mask.sum()) for site, mask in members.items()]
        if not sum(squares) > 0:
            raise ValueError(f"class {name!r} has no weights to disturb")
        lengths[name] = sum(squares) ** 0.5
    return rho * min(lengths.values())


def noise(
    weights: Mapping[str, Float[Tensor, "out in"]], members: Members, length: float, generator: torch.Generator
) -> dict[str, Float[Tensor, "out in"]]:
    """Gaussian noise on the members, in proportion to the RMS of their site, of exactly this Frobenius norm in all."""
    drawn = {}
    for site, mask in members.items():
        values = torch.randn(mask.shape, generator=generator).to(weights[site].device) * mask
        drawn[site] = values * _rms(weights[site])
    whole = sum(part.double().square().sum().item() for part in drawn.values()) ** 0.5
    return {site: part * (length / whole) for site, part in drawn.items()}


def null_class(members: Members, generator: torch.Generator) -> dict[str, Bool[Tensor, "out in"]]:
    """As many weights of the same sites, at random places."""
    return {
        site: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view_as(mask)
        for site, mask in members.items()
    }


def trajectories(
    weights: Mapping[str, Float[Tensor, "out in"]],
    classes: Mapping[str, Members],
    measure: Callable[[dict[str, Float[Tensor, "out in"]]], Response],
    *,
    rhos: tuple[float, ...] = RHOS,
    seeds: int = SEEDS,
    seed: int = 0,
    progress: Progress = silent,
) -> Trajectories:
    """Responses of every class to `seeds` draws of noise at every rho: classes x seeds x rhos measurements.

    measure: changes of the weights by site to the response of the model with them. Every class has draws of its own.
    """
    names = tuple(classes)
    lengths = tuple(common_length(weights, classes, rho) for rho in rhos)
    responses = {}
    for index, name in enumerate(names):
        for draw in range(seeds):
            for rho, length in zip(rhos, lengths):
                generator = torch.Generator().manual_seed(seed + draw * len(names) + index)
                responses[name, draw, rho] = measure(noise(weights, classes[name], length, generator))
                progress("perturbation", len(responses), len(names) * seeds * len(rhos), name)
    return gathered(responses, lengths)


def gathered(responses: Mapping[tuple[str, int, float], Response], lengths: tuple[float, ...]) -> Trajectories:
    """Trajectories from responses by (class, seed, rho), of every class at every seed and rho.

    Raises ValueError where one of these is missing.
    """
    names, seeds, rhos = (tuple(dict.fromkeys(key[place] for key in responses)) for place in range(3))
    missing = [(n, s, r) for n in names for s in seeds for r in rhos if (n, s, r) not in responses]
    if missing:
        raise ValueError(f"no response of (class, seed, rho) {missing[0]}, and {len(missing) - 1} more")
    rows = [[[responses[name, seed, rho].standardised for rho in rhos] for seed in seeds] for name in names]
    return Trajectories(names, rhos, lengths, np.array(rows), dict(responses))


def separation(of: Trajectories, *, permutations: int = 199, seed: int = 0) -> dict[tuple[str, str], Pair]:
    """Every pair of classes: distance, and share of the permutations of its labels that reach it.

    p is at least `1 / (permutations + 1)`, and hardly below the share of all deals that are the one seen: of 5 and 5
    trajectories 2 in 252, with which more than six pairs can show nothing at 0.05 once they are corrected.
    Raises ValueError for fewer than two trajectories a class.
    """
    count, seeds = of.points.shape[:2]
    if seeds < 2:
        raise ValueError(f"classes need at least two trajectories each, but got {seeds}")
    rows = of.points.reshape(count, seeds, -1)
    generator = np.random.default_rng(seed)
    found = {}
    for one, other in combinations(range(count), 2):
        both = np.concatenate([rows[one], rows[other]])
        deals = np.stack([np.arange(2 * seeds), *(generator.permutation(2 * seeds) for _ in range(permutations))])
        distances = _distances(both[deals], seeds)
        # The same deal in another order differs by rounding.
        reached = (distances[1:] >= distances[0] * (1 - 1e-9)).sum()
        found[of.classes[one], of.classes[other]] = float(distances[0]), float((1 + reached) / (permutations + 1))
    corrected = holm([p for _, p in found.values()])
    return {names: Pair(distance, p, own) for (names, (distance, p)), own in zip(found.items(), corrected, strict=True)}


def _distances(deals: Float[np.ndarray, "deals n d"], first: int) -> Float[np.ndarray, " deals"]:
    """Mahalanobis distance between the means of the first rows and of the rest, by their pooled covariance."""
    parts = deals[:, :first], deals[:, first:]
    gap = parts[0].mean(1) - parts[1].mean(1)
    left = np.concatenate([part - part.mean(1, keepdims=True) for part in parts], axis=1)
    covariance = left.transpose(0, 2, 1) @ left / (deals.shape[1] - 2)
    # By the spread of all trajectories, which no deal changes; a number that is the same in all tells nothing apart.
    ridge = np.diag(RIDGE * deals[0].var(0) + 1e-12)
    solved = np.linalg.solve(covariance + ridge, gap[..., None])[..., 0]
    return np.sqrt((gap * solved).sum(1))


def _rms(weight: Float[Tensor, "out in"]) -> float:
    return weight.double().square().mean().sqrt().item()

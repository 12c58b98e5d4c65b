"""Sample-and-aggregate: one fine-tune of the public base per disjoint shard, and only their noisy mean is released.

Each shard's change from the base is clipped to L2 norm C over all of its tensors together, so that whatever one record
does to its shard's training, it moves the mean of k changes by at most 2 C / k. Nothing is assumed of the training.
(Nissim, Raskhodnikova, Smith 2007; McMahan et al. 2018 for the clipped mean.)

A change of low rank, `scale B A`, is clipped as the product it stands for, not by its factors: `(B T)(T^-1 A)` is the
same change with factors of any norm, the mean of products is not the product of means, and a bound on both factors
bounds the product only by their product. Its norm is that of the product as it is computed. Where every shard trained
only B against one public A (the same `Public` object), changes lie in a public space of `rank` dimensions per row, and
noise goes there and nowhere else: sqrt(in / rank) times less of it.

Clipped changes are rounded to the lattice shard by shard and summed as integers, so the sum is exact. With d weights,
neighbours' sums are within `2 C / step + 1.5 sqrt(d)` steps. Norms are sums in floats, off by a factor of at most
`1 + (d + 8) 2^-53`; twice that and 1e-9 are added to C, and the norms of what is added up are taken once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from geoquant.errors import UserError
from geoquant.privacy.guarantee.adjacency import OneRecord
from geoquant.privacy.guarantee.noise import drawn, on_lattice, released, sigma_for
from geoquant.privacy.guarantee.provenance import Origin, Private, Public, Released, open_for_mechanism
from geoquant.privacy.guarantee.scope import Scope
from geoquant.privacy.guarantee.statement import GaussianNoise, Guarantee
from geoquant.privacy.guarantee.weight_ball import Release, as_float64, check_names, finished, no_seed

__all__ = ["LowRank", "aggregate", "aggregating", "noisy_mean"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change `scale b a` of one matrix: b (out, rank), a (rank, in)."""

    b: Private
    a: Private | Public
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.b, Private) or not isinstance(self.a, Private | Public):
            raise TypeError("the factors of a shard's change are Private (the right one may be Public)")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], (self.a.values if isinstance(self.a, Public) else self.a).shape[1]))


Change = Private | LowRank


def aggregate(
    shards: Sequence[Mapping[str, Change]],
    base: Mapping[str, Public],
    adjacency: OneRecord,
    *,
    epsilon: float,
    delta: float,
    seed: None = None,
) -> Release:
    """The base plus the noisy mean of the shards' clipped changes, as float32, and the guarantee.

    shards: of each, its change from the base by tensor name, the same names for all. Tensors not named stay the base's.
    A mapping may load its tensors as they are asked for: none is held on to, and each is asked for a few times.

    Raises UserError where no guarantee can be given, TypeError for changes or a base without provenance.
    """
    guarantee, tensors = aggregating(shards, base, adjacency, epsilon=epsilon, delta=delta, seed=seed)
    return Release(dict(tensors), guarantee)


def aggregating(
    shards: Sequence[Mapping[str, Change]],
    base: Mapping[str, Public],
    adjacency: OneRecord,
    *,
    epsilon: float,
    delta: float,
    seed: None = None,
) -> tuple[Guarantee, Iterator[tuple[str, Released]]]:
    """`aggregate` for a model that does not fit into memory twice: the guarantee, and the tensors one at a time.

    A tensor of the base may be overwritten once its own is out, if no shard's change is computed from it again.
    """
    no_seed(seed)
    if len(shards) != adjacency.shards:
        raise UserError("not as many shards as stated", got=len(shards), wanted=adjacency.shards)
    names = tuple(shards[0])
    origins: dict[int, Origin] = {}
    shapes: dict[str, torch.Size] = {}
    for index, shard in enumerate(shards):
        if tuple(sorted(shard)) != tuple(sorted(names)):
            raise UserError(f"shard {index} changes other tensors than shard 0")
        for name in names:
            change = shard[name]
            if not isinstance(change, Private | LowRank):
                raise TypeError(f"the change of {name} in shard {index} must be Private, got {type(change).__name__}")
            if shapes.setdefault(name, change.shape) != change.shape:
                raise UserError(f"{name} has another shape in shard {index}")
            for part in parts(change):
                origins[id(part.origin)] = part.origin
    check_names(shapes, base)
    spaces = {name: shared_space(shards, name) for name in names}
    dimensions = sum(
        math.prod(shapes[name]) if space is None else shapes[name][0] * len(space.basis)
        for name, space in spaces.items()
    )
    off = (dimensions + 8) * 2.0**-53
    sensitivity = adjacency.sensitivity * (1 + 2 * off + 1e-9)
    sigma, slack = sigma_for(epsilon, delta, sensitivity, dimensions)
    of = f"the mean of {adjacency.shards} clipped changes from the public base"
    if shared := sum(space is not None for space in spaces.values()):
        of += f" (of {shared} matrices in the space of a public right factor, which no change leaves)"
    scope = Scope(names, tuple(name for name in base if name not in shapes))
    guarantee = Guarantee(epsilon, delta, adjacency, GaussianNoise(sigma, sensitivity, slack, of), scope)
    for origin in origins.values():
        origin.claim()
    factors = [clip_factor(shard, spaces, adjacency.clip) for shard in shards]

    def tensors() -> Iterator[tuple[str, Released]]:
        added = np.zeros(len(shards))
        for name in names:
            space = spaces[name]
            clipped = (by * values_of(shard[name], space) for by, shard in zip(factors, shards))
            mean, squares = noisy_mean(clipped, len(shards), sigma)
            added += squares
            if (added > (adjacency.clip * (1 + off + 1e-9)) ** 2).any():
                raise RuntimeError("a shard's change was not the same when it was read again")  # this one stays here
            mean = mean if space is None else mean @ space.basis
            yield name, Released(finished(base[name].values, mean), guarantee)

    return guarantee, tensors()


def noisy_mean(
    clipped: Iterable[Float[np.ndarray, ...]], k: int, sigma: float
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, " k"]]:
    """The mean of k changes of one tensor, with noise, and the squared norm of each. The sum is one of integers."""
    whole = k * sigma  # the noise of the sum
    total, squares = None, []
    for change in clipped:
        total = drawn(change.shape) if total is None else total
        total += on_lattice(change, whole)
        squares.append(float(np.square(change).sum()))
    return released(total, whole) / k, np.array(squares)


@dataclass(frozen=True, eq=False)
class Space:
    """A public right factor `A = L Q`, rows of Q orthonormal: `||B A|| = ||B L||`, with fewer entries in B L."""

    left: Float[np.ndarray, "rank rank"]
    basis: Float[np.ndarray, "rank in"]


def shared_space(shards: Sequence[Mapping[str, Change]], name: str) -> Space | None:
    """The space that all changes of a matrix lie in, where every shard trained against one public factor."""
    first = shards[0][name]
    if not isinstance(first, LowRank) or not isinstance(first.a, Public):
        return None
    if not all(isinstance(shard[name], LowRank) and shard[name].a is first.a for shard in shards):
        return None
    basis, left = np.linalg.qr(as_float64(first.a.values).T)
    return Space(left.T, basis.T)


def clip_factor(shard: Mapping[str, Change], spaces: Mapping[str, Space | None], clip: float) -> float:
    """`min(1, C / norm)` over all tensors of a shard."""
    norm = math.sqrt(sum(float(np.square(values_of(shard[name], space)).sum()) for name, space in spaces.items()))
    if not math.isfinite(norm):
        raise UserError("a shard's change holds NaN or infinity", fix="train it again, or let it be zero")
    return 1.0 if norm <= clip else clip / norm


def values_of(change: Change, space: Space | None) -> Float[np.ndarray, ...]:
    """What is clipped and released of one change: its weights, or its coordinates in the shared space."""
    if isinstance(change, Private):
        return as_float64(open_for_mechanism(change))
    if space is not None:
        return change.scale * (as_float64(open_for_mechanism(change.b)) @ space.left)
    right = change.a.values if isinstance(change.a, Public) else open_for_mechanism(change.a)
    return change.scale * (as_float64(open_for_mechanism(change.b)) @ as_float64(right))


def parts(change: Change) -> list[Private]:
    found = [change] if isinstance(change, Private) else [change.b, change.a]
    return [part for part in found if isinstance(part, Private)]

"""Releasing weights so that any two weight vectors within a distance of each other are hard to tell apart.

Noise once, before anything else; after that every quantizer is post-processing, whatever it does, as long as the rest
that it uses is public or was released: its scales, its order, its metric.

The change from the public base is taken in the shape that the adjacency's norm gives it, so that the norm is L2:

    steps s:   y = (w - base) / s                 a change released back as   base + s y
    factor R:  y = (w - base) R^T,  M = R^T R     base + y R^-T: noise on w of covariance sigma^2 M^-1

and one Gaussian mechanism releases all y of all tensors (`noise.py`): neighbours at distance Delta, mu = Delta / sigma.

A product with R is computed in floats. For finite changes of at most `bound` per weight the error of one element is at
most `gamma_n bound sum_j |R_ij|`, gamma_n = n u / (1 - n u), u = 2^-53, n = in + 4, in whatever order the sum is taken
(Higham 2002, Section 3.1); both neighbours have it, and it is added to the sensitivity. `bound` is public and part of
what is stated: weights further from the base are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.errors import UserError
from geoquant.privacy.guarantee.adjacency import Norm, WeightBall
from geoquant.privacy.guarantee.noise import drawn, on_lattice, released, sigma_for
from geoquant.privacy.guarantee.provenance import Private, Public, Released, open_for_mechanism
from geoquant.privacy.guarantee.scope import Scope
from geoquant.privacy.guarantee.statement import GaussianNoise, Guarantee

__all__ = ["Release", "check_names", "finished", "no_seed", "one_origin", "perturbed", "release", "releasing"]

BOUND = 16.0  # on the change of one weight, where a factor is used
UNIT_ROUNDOFF = 2.0**-53
SLAB = 1 << 21  # weights


@dataclass(frozen=True, eq=False)
class Release:
    """What may leave: `tensors` by name (those not covered are the base's, and not listed), and their statement."""

    tensors: Mapping[str, Released]
    guarantee: Guarantee


def release(
    weights: Mapping[str, Private],
    base: Mapping[str, Public],
    adjacency: WeightBall,
    *,
    epsilon: float,
    delta: float,
    seed: None = None,
) -> Release:
    """The weights with the least noise that gives (epsilon, delta), as float32, and the guarantee.

    weights: what is released, of one origin; the choice of names must be public. base: all tensors of the public base;
    those not in `weights` stay the base's. The noise is fresh on every call, and no seed is taken.

    Raises UserError where no guarantee can be given; TypeError for weights or a base without provenance.
    """
    guarantee, tensors = releasing(weights, base, adjacency, epsilon=epsilon, delta=delta, seed=seed)
    return Release(dict(tensors), guarantee)


def releasing(
    weights: Mapping[str, Private],
    base: Mapping[str, Public],
    adjacency: WeightBall,
    *,
    epsilon: float,
    delta: float,
    seed: None = None,
) -> tuple[Guarantee, Iterator[tuple[str, Released]]]:
    """`release` for a model that does not fit into memory twice: the guarantee, and the tensors one at a time.

    A tensor of the base is read just before its own comes out, and may be overwritten then.
    """
    no_seed(seed)
    origin = one_origin(weights)
    check_names({name: held.shape for name, held in weights.items()}, base, adjacency.norm)
    scope = Scope(tuple(weights), tuple(name for name in base if name not in weights))
    dimensions = sum(held.numel() for held in weights.values())
    error = product_error(weights, adjacency.norm)
    sigma, slack = sigma_for(epsilon, delta, adjacency.radius, dimensions, error)
    of = "the change from the public base"
    if adjacency.norm.factors:
        of += f" (which is at most {BOUND:g} per weight), shaped by the metric: covariance sigma^2 M^-1"
    mechanism = GaussianNoise(sigma, adjacency.radius, slack, of)
    guarantee = Guarantee(epsilon, delta, adjacency, mechanism, scope)
    origin.claim()

    def tensors() -> Iterator[tuple[str, Released]]:
        for name, held in weights.items():
            shape = shape_of(adjacency.norm, name, tuple(held.shape))
            noisy = _in_slabs(open_for_mechanism(held), base[name].values, sigma, *shape)
            yield name, Released(noisy, guarantee)

    return guarantee, tensors()


def _in_slabs(
    weight: Tensor, base: Tensor, sigma: float, steps: np.ndarray | None, factor: np.ndarray | None
) -> Tensor:
    """Some rows at a time, in float32: a vocabulary's matrix has more weights than doubles fit into memory."""
    if weight.ndim < 2:
        return finished(base, perturbed(weight, base, sigma, steps, factor))
    found = torch.empty(weight.shape, dtype=torch.float32)
    height = max(1, SLAB // max(1, weight[0].numel()))
    for first in range(0, len(weight), height):
        own = slice(first, first + height)
        part = perturbed(weight[own], base[own], sigma, None if steps is None else steps[own], factor)
        found[own] = finished(base[own], part)
    return found


def perturbed(
    weight: Float[Tensor, ...],
    base: Float[Tensor, ...],
    sigma: float,
    steps: Float[np.ndarray, ...] | None = None,
    factor: Float[np.ndarray, "in in"] | None = None,
) -> Float[np.ndarray, ...]:
    """The mechanism on one tensor: its change from the base, with noise, in float64."""
    change = as_float64(weight) - as_float64(base)
    if steps is not None:
        change = change / steps
    if factor is not None:
        if not np.abs(change).max(initial=0.0) <= BOUND:
            raise UserError(
                "weights are too far from the base for a metric that is computed in floats",
                wanted=f"changes of at most {BOUND:g}",
                fix="take the base that was fine-tuned",
            )
        change = change @ factor.T
    noisy = released(on_lattice(change, sigma) + drawn(change.shape), sigma)
    if steps is not None:
        return noisy * steps
    return noisy if factor is None else np.linalg.solve(factor, noisy.T).T


def shape_of(norm: Norm, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Steps and factor of one tensor, as `perturbed` takes them."""
    steps, factor = norm.steps.get(name), norm.factors.get(name)
    return (
        None if steps is None else np.broadcast_to(as_float64(torch.as_tensor(steps.values)), shape),
        None if factor is None else as_float64(factor.values),
    )


def product_error(weights: Mapping[str, Private], norm: Norm) -> float:
    """Of the products with the factors, of both neighbours: `2 || bound gamma_n |R| 1 ||` over all rows."""
    total = 0.0
    for name, factor in norm.factors.items():
        if name not in weights:
            continue
        columns = weights[name].shape[1]
        gamma = (columns + 4) * UNIT_ROUNDOFF / (1 - (columns + 4) * UNIT_ROUNDOFF)  # with the difference's own
        largest = BOUND * gamma * np.abs(as_float64(factor.values)).sum(1)
        total += weights[name].shape[0] * float((largest**2).sum())
    return 2 * (1 + 1e-6) * math.sqrt(total)


def finished(base: Float[Tensor, ...], change: Float[np.ndarray, ...]) -> Float[Tensor, ...]:
    return torch.from_numpy(as_float64(base) + change).to(torch.float32)


def as_float64(values: Tensor) -> Float[np.ndarray, ...]:
    return values.detach().to("cpu", torch.float64).numpy()


def no_seed(seed: object) -> None:
    if seed is not None:
        raise UserError(
            "noise of a guarantee takes no seed: whoever has it can take the noise away again",
            got="a seed",
            fix="leave it out; a release is not meant to be repeatable",
        )


def one_origin(weights: Mapping[str, Private]):
    """The origin that all tensors share."""
    if not weights:
        raise UserError("there is nothing to release")
    for name, held in weights.items():
        if not isinstance(held, Private):
            raise TypeError(f"the weights of {name} must be Private, got {type(held).__name__}")
    origins = {id(held.origin): held.origin for held in weights.values()}
    if len(origins) > 1:
        raise UserError("these weights are of several models", got=", ".join(o.name for o in origins.values()))
    return next(iter(origins.values()))


def check_names(shapes: Mapping[str, torch.Size], base: Mapping[str, Public], norm: Norm | None = None) -> None:
    """Every released tensor starts at a public one of its shape, and the norm's shapes fit."""
    for name, value in base.items():
        if not isinstance(value, Public):
            raise TypeError(f"the base's {name} must be Public, got {type(value).__name__}")
    for name, shape in shapes.items():
        if name not in base:
            raise UserError(
                f"the public base has no tensor {name!r}",
                fix="add one of zeros, as Public(values, source), if the architecture is public",
            )
        if (wanted := tuple(base[name].values.shape)) != tuple(shape):
            raise UserError(f"{name} has another shape in the base", got=tuple(shape), wanted=wanted)
    for name in norm.factors if norm else ():
        if name in shapes:
            factor, wanted = norm.factors[name].values, (shapes[name][-1],) * 2
            if len(shapes[name]) != 2 or tuple(factor.shape) != wanted:
                raise UserError(f"the factor of {name} does not fit", got=tuple(factor.shape), wanted=wanted)
            if not (torch.triu(factor).equal(factor) and bool((factor.diagonal() > 0).all())):
                raise UserError(f"the factor of {name} must be upper triangular with a positive diagonal")

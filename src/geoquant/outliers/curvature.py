"""The sharpest directions of a whole model: leading eigenpairs of its Gauss-Newton matrix, and which sites they are in.

A step of length r along an eigenvector of eigenvalue lambda changes the predictions by a KL divergence of
`lambda r^2 / 2` nats per token, to second order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.geometry.lanczos import Trace, stochastic_trace, top_eigenpairs
from geoquant.observe.gauss_newton import GaussNewton

__all__ = ["ModelCurvature", "model_curvature"]


@dataclass(frozen=True)
class ModelCurvature:
    """Leading curvature of a model, in nats per token and squared unit of the weights.

    values, residuals, products, at_least, converged: as in `geometry.lanczos.Eigenpairs`. trace: of the whole matrix.
    shares: by parameter, the part of each eigenvector's squared length that lies in it. even: the part of all numbers
    that the parameter holds, which is the share that a random direction would have there.
    """

    values: Float[Tensor, " found"]
    residuals: Float[Tensor, " found"]
    products: int
    at_least: float
    converged: bool
    trace: Trace
    shares: dict[str, Float[Tensor, " found"]]
    even: dict[str, float]


@torch.no_grad()
def model_curvature(
    model: nn.Module,
    tokens: Int[Tensor, "n length"],
    k: int = 3,
    *,
    names: Sequence[str] | None = None,
    chunk: int = 1,
    tolerance: float = 1e-3,
    limit: int = 60,
    spare: int | None = None,
    probes: int = 4,
    seed: int = 0,
) -> ModelCurvature:
    """The k largest eigenvalues over the weights of all sites, or over the parameters `names`.

    A product costs about two training steps on the windows. Where the mirror image is smaller than the
    weights (see `observe.gauss_newton`) it is searched instead, and eigenvectors are carried over. limit, spare: of
    the search, as in `geometry.lanczos.top_eigenpairs`; each of the k + spare vectors takes four bytes per number.
    """
    operator = GaussNewton(model, tokens, names, chunk=chunk)
    mirrored = operator.outputs < operator.parameters
    product, size = (operator.mirrored, operator.outputs) if mirrored else (operator.product, operator.parameters)
    where = {"dtype": torch.float32, "device": operator.device}
    found = top_eigenpairs(
        product, size, k, tolerance=tolerance, limit=limit, spare=spare, again=False, seed=seed, **where
    )
    trace = stochastic_trace(product, size, probes, torch.Generator().manual_seed(seed), **where)
    shares: dict[str, list[Tensor]] = {name: [] for name in operator.names}
    for vector in found.vectors.T:
        direction = operator.to_weights(vector.to(operator.device)) if mirrored else vector
        total = direction.double().square().sum()
        for name, part in operator.parts(direction).items():
            shares[name].append((part.double().square().sum() / total).cpu())
    return ModelCurvature(
        values=found.values,
        residuals=found.residuals,
        products=found.products,
        at_least=found.at_least,
        converged=found.converged,
        trace=trace,
        shares={name: torch.stack(parts) if parts else torch.zeros(0) for name, parts in shares.items()},
        even={name: value.numel() / operator.parameters for name, value in operator.chosen.items()},
    )

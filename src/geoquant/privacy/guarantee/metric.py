"""The shape of a ball in the metric of public inputs: noise goes where the public function does not care.

For the inputs x of a linear map, as public text makes them pass through the public base, A = E[x x^T] and

    M = A / mean(diag A) + d I,    M = R^T R,    distance of a row w:  ||R w||,

so that on average over directions a change counts as long as it is. d is part of the statement.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.walk import walk
from geoquant.observe.stream import hooks
from geoquant.privacy.guarantee.provenance import Public

__all__ = ["DAMPING", "metric_factors", "upper_factor"]

DAMPING = 0.01


@torch.no_grad()
def metric_factors(model: nn.Module, tokens: Int[Tensor, "n length"], text: str) -> dict[str, Public]:
    """The factor R of every linear map inside the blocks, by the name of its weight; maps with one input share it.

    model: the public base. text: where the tokens are from, for the statement. Holds `columns^2` doubles per input.
    """
    source = f"{tokens.numel()} tokens of {text} under the public base, damped by {DAMPING:.0%} of the mean diagonal"
    sums: dict[str, Tensor] = {}

    def seen(name: str):
        def add(_, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0.0) + (x.T @ x).double()

        return add

    modules = dict(model.named_modules())
    stages = [stage for block in walk(model, tokens[:1, :8]) for stage in block.stages]
    with hooks([modules[stage.name].register_forward_pre_hook(seen(stage.name)) for stage in stages]):
        for window in tokens:
            model(window[None].to(model.device))
    found = {}
    for stage in stages:
        if stage.name not in sums:
            continue  # an expert that no token reached counts as it is
        factor = Public(upper_factor(sums.pop(stage.name)), source)
        for site in stage.sites:
            # A weight that is stored as (in, out) has its inputs in rows, which a factor does not multiply.
            if tuple(modules[site.name].weight.shape) == site.shape and type(modules[site.name]) is nn.Linear:
                found[f"{site.name}.weight"] = factor
    if not found:
        raise UserError("the public base has no linear maps with a metric", fix="use --ball euclidean")
    return found


def upper_factor(moments: Float[Tensor, "in in"], damping: float = DAMPING) -> Float[Tensor, "in in"]:
    """Upper triangular R with a positive diagonal and `R^T R = A / mean(diag A) + damping I`."""
    metric = moments.double() / moments.diagonal().double().mean()
    metric = (metric + metric.T) / 2 + damping * torch.eye(len(metric), dtype=torch.float64)
    return torch.linalg.cholesky(metric, upper=True)

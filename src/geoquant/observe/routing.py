"""Which tokens a mixture of experts sends to which expert, and the matrices of its experts.

transformers keeps all experts of a block in one module, their matrices stacked in three-dimensional parameters, and
calls it with the tokens and the experts that were chosen for each: there the choice is read, after whatever a router
makes of its logits (biases, groups, masks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError

__all__ = ["Routed", "expert_matrices", "experts_of", "routed"]


@dataclass(frozen=True)
class Routed:
    """The tokens of one forward pass at one mixture of experts: what came in, and who was chosen."""

    inputs: Float[Tensor, "tokens in"]
    chosen: Int[Tensor, "tokens k"]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold stacked experts, by name.

    Raises UserError where there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "num_experts") and any(own.ndim == 3 for own in module.parameters(recurse=False))
    }
    if not found:
        raise UserError(
            f"found no stacked experts in {type(model).__name__}",
            wanted="a mixture of experts of the Mixtral or Qwen MoE kind",
        )
    return found


def expert_matrices(experts: nn.Module) -> dict[str, Float[Tensor, "experts out in"]]:
    """The stacked matrices of a module of experts, by the names of their parameters, as float32 copies."""
    across = getattr(experts, "is_transposed", False)
    return {
        name: (own.detach().mT if across else own.detach()).to(torch.float32, copy=True).contiguous()
        for name, own in experts.named_parameters(recurse=False)
        if own.ndim == 3
    }


@torch.no_grad()
def routed(model: nn.Module, tokens: Int[Tensor, "n length"], take: Callable[[str, Routed], None]) -> None:
    """One forward pass that hands what each module of experts gets to `take`, by its name, in the order of blocks.

    Raises UserError where a module of experts is called without a choice.
    """

    def hook(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            choices = [value for value in given if not value.is_floating_point()]
            if not choices or given[0] is choices[0]:
                raise UserError(f"{name} was called without the experts that were chosen")
            chosen = choices[0].detach().flatten(0, -2)
            take(name, Routed(given[0].detach().flatten(0, -2), chosen))

        return record

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in experts_of(model).items()
    ]
    try:
        model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()

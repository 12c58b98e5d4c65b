"""LoRA: a matrix learns by adding a product of two thin ones, and nothing else of the model learns.

    y = x W^T + SCALE (x A^T) B^T        A: rank x in,  B: out x rank

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022 (arXiv:2106.09685), with alpha = SCALE * rank.
B starts at zero, so an untrained adapter changes nothing; A is uniform within 1 / sqrt(in), as a linear layer starts.
All linear layers are adapted but the projection onto the vocabulary (Dettmers et al.: QLoRA, arXiv:2305.14314, found
that all are needed to come close to a full fine-tune).

The term is added by a forward hook: no module is replaced, and merged weights are an ordinary model again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.errors import UserError

__all__ = ["SCALE", "Adapter", "adapters", "attach", "merged"]

SCALE = 2.0  # alpha / rank; alpha = 2 rank is the usual choice


@dataclass(frozen=True)
class Adapter:
    """The two factors of one linear layer; `transposed` where it stores its weight as (in, out), as GPT-2 does."""

    name: str
    module: nn.Module
    down: Float[nn.Parameter, "rank in"]
    up: Float[nn.Parameter, "out rank"]
    transposed: bool


def adapters(model: nn.Module, rank: int, seed: int = 0) -> list[Adapter]:
    """Fresh float32 factors for every linear layer but the head, on its device; the same seed gives the same factors.

    Raises UserError for a rank below 1 and where there is no linear layer.
    """
    if rank < 1:
        raise UserError(f"cannot make adapters of rank {rank}", wanted="a whole number from 1")
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    made = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module is head or kind not in ("Linear", "Conv1D"):
            continue
        transposed = kind == "Conv1D"
        out, columns = reversed(module.weight.shape) if transposed else module.weight.shape
        down = (2 * torch.rand(rank, columns, generator=generator) - 1) * columns**-0.5
        up = torch.zeros(out, rank)
        factors = (nn.Parameter(part.to(module.weight.device)) for part in (down, up))
        made.append(Adapter(name, module, *factors, transposed))
    if not made:
        raise UserError("the model has no linear layers that adapters could be added to", fix="train all its weights")
    return made


def attach(adapter: Adapter) -> torch.utils.hooks.RemovableHandle:
    """From now on the layer's output holds the adapter's term, until `.remove()` of what is returned."""

    def add(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + SCALE * (inputs[0] @ adapter.down.T) @ adapter.up.T

    return adapter.module.register_forward_hook(add)


def merged(
    weight: Float[Tensor, "a b"], down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"], transposed: bool
) -> Float[Tensor, "a b"]:
    """The weight that computes the same without the adapter: a new tensor of the same type, summed in float32."""
    update = SCALE * up.float() @ down.float()
    return (weight.float() + (update.T if transposed else update)).to(weight.dtype)

"""The weights of a model that is being trained: at rest its own, at work in the type that computes fast.

Updates gather in float32 masters, whatever is computed in. Only the masters and their moments are the state of a
training run: everything else follows from them and from the weights it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.privacy.lora import adapters, attach, merged

__all__ = ["Masters"]


class Masters:
    """What of `model` learns, as float32 tensors in `.values`: all that requires a gradient, or factors of `rank`.

    Between `work()` and `rest()` the model computes in `compute` and gradients arrive in its type; outside it has its
    own types, with everything learned so far in its weights and no trace of adapters.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int, compute: torch.dtype):
        self.compute = compute
        self.adapters = adapters(model, rank, seed) if rank else []
        if self.adapters:
            self.learning = [part for adapter in self.adapters for part in (adapter.down, adapter.up)]
        else:
            self.learning = [weight for weight in model.parameters() if weight.requires_grad]
        if not self.learning:
            raise UserError(
                "no weight of the model requires a gradient",
                fix="call model.requires_grad_(True), or train adapters (lora = 8)",
            )
        chosen = {id(weight) for weight in self.learning}
        others = [weight for weight in model.parameters() if id(weight) not in chosen]
        self.frozen = [(weight, weight.data, weight.requires_grad) for weight in others]
        self.own_types = [weight.dtype for weight in self.learning]
        self.values = [weight.detach().float().clone() for weight in self.learning]
        self.handles: list = []

    def work(self) -> None:
        """Make the model ready for the next step."""
        for weight, own, _ in self.frozen:
            weight.data = own.to(self.compute)
            weight.requires_grad_(False)
        for weight, master in zip(self.learning, self.values, strict=True):
            weight.data = master.to(self.compute, copy=True)
        self.handles += [attach(adapter) for adapter in self.adapters]

    def rest(self) -> None:
        """Make the model what it would be if training ended now; adapters are merged."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for weight, own, learns in self.frozen:
            weight.data = own
            weight.requires_grad_(learns)
        for weight, master, own_type in zip(self.learning, self.values, self.own_types, strict=True):
            weight.data = master.to(own_type)
        for adapter in self.adapters:
            weight = adapter.module.weight
            weight.data = merged(weight.data, adapter.down.data, adapter.up.data, adapter.transposed)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """A pause in which the model may be looked at, but not changed."""
        self.rest()
        yield
        self.work()

    def take_gradients(self) -> None:
        """Move what the backward pass left to the masters, as float32."""
        for weight, master in zip(self.learning, self.values, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    def show(self) -> None:
        """Copy the masters into what the next step computes with."""
        for weight, master in zip(self.learning, self.values, strict=True):
            weight.data.copy_(master)

    def beginning(self) -> Iterator[Tensor]:
        """All that a run begins with: to be told apart from another one, before anything was learned."""
        yield from (own for _, own, _ in self.frozen)
        yield from self.values

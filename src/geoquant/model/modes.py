"""Modes that a model is in for a while and leaves as it was: evaluation, and blocks that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from geoquant.model.walk import find_blocks

__all__ = ["evaluating", "recomputed"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing drops out. `model.train()` afterwards would also wake modules that were frozen on purpose."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, blocks keep only what enters them and are computed again on the way back."""
    _, blocks = find_blocks(model)
    try:
        for block in blocks:
            forward = block.forward

            def again(*args: object, _forward: Callable = forward, **kwargs: object) -> object:
                return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

            block.forward = again
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)

"""The full-precision model beside the one that is being quantized, on the same windows, block by block.

Costs its hidden states (as large as those of the quantized model), one forward pass, and the original weights of the
block in work, which are those of the model files: nothing of it needs to be saved, a resumed run computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.observe.compute import BlockCall, autocast, standing_copy
from geoquant.observe.replay import Replay

__all__ = ["Reference"]


@dataclass
class Reference:
    """Hidden states that enter the next block in full precision, by the number of their batch. For each block: `enter`
    before any of its weights changes, `inputs` of its stages in the order of the walk, `leave`.
    """

    batches: dict[int, Float[Tensor, "b l h"]]
    compute: torch.dtype
    work: nn.Module | None = field(default=None, init=False)
    passes: Replay | None = field(default=None, init=False)

    def enter(self, block: nn.Module, call: BlockCall) -> None:
        """Hold on to the block's weights as they are."""
        self.work, self.passes = standing_copy(block, self.compute), Replay(call, list(self.batches.values()))

    def inputs(self, site: str, waiting: frozenset[str], *, keep: bool) -> dict[int, Float[Tensor, "tokens in"]]:
        """The inputs of `site` (its name inside the block) by batch, of those that reach it.

        waiting, keep: as in `Replay`.
        """
        found: dict[int, Tensor] = {}
        names = list(self.batches)
        self.passes.waiting = waiting
        with autocast(self.passes.batches[0].device, self.compute):
            self.passes.observe(self.work, site, lambda place, x: found.update({names[place]: x}), keep=keep)
        return found

    def leave(self) -> None:
        """On to the next block."""
        self.passes.waiting = frozenset()
        with autocast(self.passes.batches[0].device, self.compute):
            for place, (index, hidden) in enumerate(zip(self.batches, self.passes.outputs(self.work))):
                self.batches[index] = self.passes.batches[place] = hidden.float()  # what entered is not needed again
        self.work = self.passes = None

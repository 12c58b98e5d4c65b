"""Forward passes that start at a block: what the blocks before it would do was kept.

Weights that are changed in block b leave the hidden states that enter it as they were. Those are kept once, for the
batches of tokens that a measurement uses; the same measurement then runs the blocks from b on and the head, half a
forward pass on average, and gives what the whole pass would have given, to the last bit. Nothing of the measurement
needs to know: the model is called as always, blocks that have nothing to do return what they get, and block b gets what
was kept. Batches that were never seen run in full.

Memory: one hidden state per token and block, in the type that the model computes in. Where that is more than is
allowed, only every second, fourth... block's input is kept, and passes start a few blocks earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from geoquant.model.halves import widened
from geoquant.model.walk import find_blocks
from geoquant.observe.stream import hooks

__all__ = ["Resume"]

MEMORY = 1 << 30  # bytes of hidden states


@dataclass
class Resume:
    """The kept hidden states of one model. A block's index here may be that of none: what leaves the last block.

    memory: bytes that may be kept. stride: of blocks whose input is kept. kept: by batch of tokens, by block.
    extras: what a block returns besides hidden states.
    """

    model: nn.Module
    memory: int = MEMORY
    stride: int = 1
    kept: dict[tuple, dict[int, Tensor]] = field(default_factory=dict)
    extras: dict[int, tuple | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What is kept, in bytes."""
        return sum(state.nbytes for states in self.kept.values() for state in states.values())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every batch that passes is kept. The model must not change between this and what is resumed."""
        _, blocks = find_blocks(self.model)
        example: list[Tensor] = []
        used, current = self.bytes, {}

        def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal current
            key = _key(args, kwargs)
            current = {} if key is None else self.kept.setdefault(key, {})
            if key is not None and not example:
                example.append(args[0] if args else kwargs["input_ids"])

        def keep(index: int, state: Tensor) -> None:
            nonlocal used
            if index % self.stride == 0 and index not in current:
                current[index] = state.detach().clone()  # a block may write to its input
                used += state.nbytes
            while used > self.memory and self.stride < len(blocks):
                self.stride *= 2
                for states in self.kept.values():
                    for other in [other for other in states if other % self.stride]:
                        used -= states.pop(other).nbytes

        def enter(index: int, args: tuple, kwargs: dict) -> None:
            if index:  # what enters the first is quickly made anew
                keep(index, args[0] if args else kwargs["hidden_states"])

        def leave(index: int, output: Tensor | tuple) -> None:
            self.extras[index] = output[1:] if isinstance(output, tuple) else None
            if index == len(blocks) - 1:
                keep(index + 1, output[0] if isinstance(output, tuple) else output)

        handles = [self.model.base_model.register_forward_pre_hook(begin, with_kwargs=True)]
        for index, block in enumerate(blocks):
            handles.append(
                block.register_forward_pre_hook(lambda _, a, k, index=index: enter(index, a, k), with_kwargs=True)
            )
            handles.append(block.register_forward_hook(lambda _, __, output, index=index: leave(index, output)))
        with hooks(handles):
            yield
        if example and not self._true_to(example[0]):
            self.kept.clear()

    @contextmanager
    def starting_at(self, block: int) -> Iterator[None]:
        """Inside, kept batches start at `block` or a little earlier; 0 runs all, the number of blocks none of them."""
        _, blocks = find_blocks(self.model)
        known: dict[int, Tensor] = {}
        start = 0

        def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal known, start
            known = self.kept.get(_key(args, kwargs), {})
            start = max((index for index in known if index <= block), default=0)

        def replaced(index: int, own, args: tuple, kwargs: dict):
            if start and index == start:
                state = known[start].clone()
                args, kwargs = ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})
            if index >= start:
                return own(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == len(blocks) - 1:
                hidden = known[start].clone()
            rest = self.extras[index]
            return hidden if rest is None else (hidden, *rest)

        before = [(part, "forward" in vars(part), part.forward) for part in blocks]
        with hooks([self.model.base_model.register_forward_pre_hook(begin, with_kwargs=True)]):
            try:
                for index, (part, _, own) in enumerate(before):
                    part.forward = lambda *a, index=index, own=own, **k: replaced(index, own, a, k)
                yield
            finally:
                for part, replaced_before, own in before:
                    del part.forward
                    if replaced_before:
                        part.forward = own

    @torch.no_grad()
    def _true_to(self, tokens: Tensor) -> bool:
        """Whether a pass from the middle gives what a whole one does; not where blocks exchange more than one state."""
        if any(isinstance(item, Tensor) for rest in self.extras.values() for item in rest or ()):
            return False
        # Widened as in every measurement: sums of halves would differ from what was kept by far more than 1e-4.
        with widened(tokens.device):
            whole = self.model.base_model(tokens, use_cache=False).last_hidden_state
            # What a block left behind for a later one must not be there by chance.
            self.model.base_model(tokens.roll(1, 1), use_cache=False)
            with self.starting_at(max(1, len(find_blocks(self.model)[1]) // 2)):
                part = self.model.base_model(tokens, use_cache=False).last_hidden_state
        return torch.equal(whole, part) or bool((whole - part).abs().max() <= 1e-4 * whole.abs().max())


def _key(args: tuple, kwargs: dict) -> tuple | None:
    """Names a batch; None where the model is given more than tokens."""
    given = [*args, *(value for name, value in kwargs.items() if not (value is None or isinstance(value, bool)))]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].is_floating_point():
        return None
    return tuple(given[0].shape), given[0].cpu().numpy().tobytes()

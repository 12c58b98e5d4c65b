"""Forward passes through one block that start where the last one stopped.

Solving a block site by site needs the input of every stage once more after each change: naively about three
forward passes per block. But what a solved part of the block returns never changes again. When a pass stops at a
site, its input is kept; the next pass multiplies that input with the solved weight and, where the site ends a
submodule (o_proj ends the attention), hands the product out as the submodule's output instead of running it.
All passes together then cost about one forward pass, and the values are the same to the last bit.

Whether a site ends a submodule is observed, not guessed: the first batch of the next pass runs in full, and the
submodule must return the very memory that the site wrote, unchanged since. A submodule with sites that are still to be
observed is never skipped: an expert may be idle in the first batch. What is handed out is a copy, as the block may
write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.observe.stream import BlockCall, Stop, hooks, run_block

__all__ = ["Replay"]


@dataclass
class Replay:
    """The passes of one block over the same batches. `work` may be a new copy at each pass, with weights changed only
    in sites that were observed before; after any other change call `forget`.
    """

    call: BlockCall
    batches: Sequence[Float[Tensor, "b l h"]]
    # Outputs of finished submodules, per batch; what the submodule returned besides them.
    finished: dict[str, list[Tensor]] = field(default_factory=dict)
    extras: dict[str, tuple | None] = field(default_factory=dict)
    # Sites (names inside the block) that are still to be observed.
    waiting: frozenset[str] = frozenset()
    # The site where the last pass stopped, and its input per batch.
    last: str | None = None
    inputs: list[Tensor | None] = field(default_factory=list)

    def forget(self) -> None:
        """The block has changed: the next pass runs in full."""
        self.finished.clear()
        self.extras.clear()
        self.last, self.inputs = None, []

    @torch.no_grad()
    def observe(
        self, work: nn.Module, site: str, see: Callable[[int, Float[Tensor, "tokens in"]], None], *, keep: bool
    ) -> None:
        """Hand the input of `site` (its name inside the block) to `see`, batch by batch, flattened to tokens.

        keep: remember the inputs, so that the next pass can start from them; of use where the stage has one site.
        """
        seen: list[Tensor] = []
        kept: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple, named: dict) -> None:
            seen.append(inputs[0] if inputs else next(iter(named.values())))
            raise Stop

        def run(hidden: Tensor) -> None:
            try:
                run_block(work, self.call, hidden.clone())  # a block may write to its input
            except Stop:
                return

        with hooks([work.get_submodule(site).register_forward_pre_hook(stop, with_kwargs=True)]):
            for index, _ in enumerate(self._each(work, run)):
                if not seen:  # an expert that this batch does not reach
                    continue
                x = seen.pop()
                if keep:
                    kept.append(x)
                see(index, x.reshape(-1, x.shape[-1]))
        tokens = [hidden.shape[0] * hidden.shape[1] for hidden in self.batches]
        whole = [x.numel() // x.shape[-1] for x in kept] == tokens
        self.last, self.inputs = (site, kept) if whole else (None, [])

    @torch.no_grad()
    def outputs(self, work: nn.Module) -> Iterator[Float[Tensor, "b l h"]]:
        """The block's output for each batch."""
        yield from self._each(work, lambda hidden: run_block(work, self.call, hidden.clone()))

    def _each(self, work: nn.Module, run: Callable[[Tensor], object]) -> Iterator:
        """`run` every batch with all that is known put in place of the modules that computed it."""
        ended = None
        for index, hidden in enumerate(self.batches):
            known = {name: values[index] for name, values in self.finished.items() if name != ended}
            if self.last is not None and index == 0:
                with self._spied(work, self.last) as found, self._replaced(work, known):
                    result = run(hidden)
                ended = self._end(work, *found)
            else:
                if ended is not None:
                    product = work.get_submodule(self.last)(self.inputs[index])
                    self.inputs[index] = None  # not needed again
                    self.finished[ended].append(product)
                    known[ended] = product
                with self._replaced(work, known):
                    result = run(hidden)
            yield result

    @contextmanager
    def _spied(self, work: nn.Module, site: str) -> Iterator[tuple[list, list]]:
        """Records what `site` and the submodules around it return."""
        written: list[tuple[Tensor, int]] = []
        returned: list[tuple[str, object]] = []
        parts = site.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        handles = [
            work.get_submodule(site).register_forward_hook(
                lambda _, __, output: written.append((output, version(output)))
            )
        ]
        handles += [
            work.get_submodule(name).register_forward_hook(lambda _, __, output, n=name: returned.append((n, output)))
            for name in around
        ]
        with hooks(handles):
            yield written, returned

    def _end(self, work: nn.Module, written: list, returned: list) -> str | None:
        """The outermost submodule that returned just what the site wrote, if there is one; its output is kept."""
        if len(written) != 1:
            return None
        product, version_then = written[0]
        found = None
        for name, output in returned:
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            once = sum(other == name for other, _ in returned) == 1
            same = isinstance(first, Tensor) and first.shape == product.shape and first.data_ptr() == product.data_ptr()
            simple = not any(isinstance(item, Tensor) for item in rest or ())
            reached = not any(other.startswith(f"{name}.") for other in self.waiting)
            if once and same and simple and reached and version(first) == version_then:
                found = name, first, rest
        if found is None:
            return None
        name, first, rest = found
        for inner in [other for other in self.finished if other.startswith(f"{name}.")]:
            del self.finished[inner], self.extras[inner]
        self.finished[name], self.extras[name] = [first.clone()], rest
        return name

    @contextmanager
    def _replaced(self, work: nn.Module, known: dict[str, Tensor]) -> Iterator[None]:
        """Submodules that return what is known of them."""
        modules = {work.get_submodule(name): (name, value) for name, value in known.items()}
        for module, (name, value) in modules.items():
            rest = self.extras[name]
            module.forward = lambda *_, value=value, rest=rest, **__: (
                value.clone() if rest is None else (value.clone(), *rest)
            )
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def version(tensor: Tensor) -> int:
    """How often the memory of a tensor was written in place."""
    return tensor._version

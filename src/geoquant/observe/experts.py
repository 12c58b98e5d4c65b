"""Experts that transformers keeps in one stacked parameter, as sites of their own; and which tokens reach which site.

In eager mode a module of experts takes the tokens of one expert after the other (`hidden[token_index]`) and multiplies
them with a slice of its stack (`stack[expert]`). Both can be seen from outside, so no architecture needs code of its
own: a product with a slice belongs to that expert, and an indexing of all tokens says which of them its rows are. The
second says so too for experts that are linear modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from geoquant.errors import UserError
from geoquant.model.halves import widened
from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, Site, find_blocks, kind_of, read_weight
from geoquant.observe.routing import experts_of
from geoquant.observe.stream import hooks

__all__ = ["Expert", "Routes", "eager_experts", "find_experts", "read_site"]

LINEAR = {nn.functional.linear}
MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}  # these take (in, out)
SELECT = {torch.index_select, Tensor.index_select}


@dataclass(frozen=True)
class Expert:
    """One slice of a stacked parameter. across: whether the slice is stored as (in, out)."""

    site: Site
    stack: str
    index: int
    across: bool


# Seen(stack, expert, inputs, which tokens these are, output, whether the slice is (in, out)).
Seen = Callable[[str, int, Tensor, Tensor, Tensor, bool], None]


class Routes(TorchFunctionMode):
    """Inside this context, each product with a slice of one of `stacks` is handed to `see`.

    tokens: of the batch, flattened. One context serves one forward pass, of which it keeps the rows that were taken.
    """

    def __init__(self, tokens: int, stacks: Mapping[str, Tensor], see: Seen | None = None):
        super().__init__()
        self.tokens, self.stacks, self.see = tokens, stacks, see
        # By address; the tensor is kept, or its address would become another's.
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        self.owners: dict[object, Tensor] = {}

    def rows(self, x: Tensor, owner: object) -> Int[Tensor, " n"] | None:
        """Which tokens the rows of x are: those that were taken, else those of the last input of this owner (an
        expert's second matrix reads what its first one made), else all; None where that does not fit.
        """
        count = x.numel() // max(1, x.shape[-1])
        if x.data_ptr() in self.taken and len(self.taken[x.data_ptr()][1]) == count:
            self.owners[owner] = self.taken[x.data_ptr()][1]
        elif owner not in self.owners and count == self.tokens:
            self.owners[owner] = torch.arange(count, device=x.device)
        found = self.owners.get(owner)
        return found if found is not None and len(found) == count else None

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is Tensor.__getitem__:
            self._take(args[0], args[1], result)
        elif function in SELECT and len(args) == 3 and args[1] == 0:
            self._take(args[0], args[2], result)
        elif (function in LINEAR or function in MATMUL) and len(args) > 1 and (place := self._place(args[1])):
            x = args[0]
            rows = self.rows(x, (place[0].rpartition(".")[0], place[1]))
            if rows is None:
                raise UserError(f"which tokens reach expert {place[1]} of {place[0]} is not known")
            if self.see is not None and len(rows):
                self.see(*place, x, rows, result, function in MATMUL)
        return result

    def _take(self, source: object, index: object, result: Tensor) -> None:
        """Remember rows that were taken from all tokens."""
        parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
        if not isinstance(source, Tensor) or source.ndim != 2 or len(source) != self.tokens or not parts:
            return
        first, rest = parts[0], parts[1:]
        if not isinstance(first, Tensor) or first.ndim != 1 or any(isinstance(part, Tensor | int) for part in rest):
            return
        self.taken[result.data_ptr()] = (result, first.nonzero().flatten() if first.dtype == torch.bool else first)

    def _place(self, weight: object) -> tuple[str, int] | None:
        """The stack and the expert of a slice."""
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        for name, stack in self.stacks.items():
            offset = weight.data_ptr() - stack.data_ptr()
            size = stack[0].numel() * stack.element_size()
            if weight.shape == stack.shape[1:] and 0 <= offset < len(stack) * size and offset % size == 0:
                return name, offset // size
        return None


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Inside, modules of experts go through their experts one after the other, each with its own tokens."""
    config = model.config
    before = getattr(config, "_experts_implementation", None)
    if before is None or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@torch.no_grad()
def find_experts(
    model: nn.Module, blocks: tuple[Block, ...], probe: Int[Tensor, "n length"], pages: Pages = UNMAPPED
) -> dict[int, tuple[Expert, ...]]:
    """The stacked experts of each block, by its index: one site for each slice.

    Only stacks whose slices a forward pass of `probe` multiplies with, all of its tokens equally often: of others
    nobody could say which tokens reach which expert.
    """
    try:
        modules = experts_of(model)
    except UserError:
        return {}
    stacks = {
        f"{name}.{own}": parameter
        for name, module in modules.items()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
    seen = dict.fromkeys(stacks, 0)
    across: dict[str, bool] = {}

    def see(stack: str, _: int, x: Tensor, rows: Tensor, output: Tensor, transposed: bool) -> None:
        seen[stack] += len(rows)
        across[stack] = transposed

    _, parts = find_blocks(model)
    release = [part.register_forward_hook(lambda used, *_: pages.release(used.parameters())) for part in parts]
    try:
        with hooks(release), eager_experts(model), widened(model.device), Routes(probe.numel(), stacks, see):
            model(probe.to(model.device), use_cache=False)
    except UserError:
        return {}
    found: dict[int, tuple[Expert, ...]] = {}
    for block in blocks:
        here = f"{block.name}."
        known = [name for name in stacks if name.startswith(here) and seen[name] and seen[name] % probe.numel() == 0]
        found[block.index] = tuple(
            _expert(here, block.index, name, index, stacks[name].shape[1:], across[name])
            for name in known
            for index in range(len(stacks[name]))
        )
    return {index: experts for index, experts in found.items() if experts}


def _expert(here: str, block: int, stack: str, index: int, shape: tuple[int, int], across: bool) -> Expert:
    module, _, own = stack.rpartition(".")
    name = f"{module}.{index}.{own}"
    rows, columns = reversed(shape) if across else shape
    return Expert(Site(name, block, (rows, columns), kind_of(name.removeprefix(here)), name), stack, index, across)


def read_site(model: nn.Module, site: Site, experts: Mapping[str, Expert]) -> Float[Tensor, "out in"]:
    """The weight of a linear module or of one of `experts` (by the name of the site) as a float32 copy."""
    expert = experts.get(site.name)
    if expert is None:
        return read_weight(model.get_submodule(site.name))
    own = model.get_parameter(expert.stack).detach()[expert.index]
    return (own.mT if expert.across else own).to(torch.float32, copy=True).contiguous()

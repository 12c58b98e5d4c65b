"""Find a model's blocks and its linear sites from the module tree, whatever the architecture.

Blocks are the longest list of like modules that hold linear maps. A *site* is one linear map inside a block.
Which sites share an input (q/k/v; gate/up) is observed, not guessed: one probe forward pass compares the
tensors that reach them. GPT-2 stores its linears transposed (`Conv1D`); a site's weight is always read and
written as (out, in).

Not sites, and so never quantized: the routers of mixtures of experts (a few thousand weights that decide where
every token goes), and experts that transformers stores as one three-dimensional parameter instead of linear
modules (Mixtral, Qwen MoE...; an analysis watches these all the same, see observe/experts.py). `untouched_parameters`
lists what is left out, so that nobody is surprised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.paging import UNMAPPED, Pages

__all__ = [
    "Block",
    "Site",
    "Stage",
    "find_blocks",
    "read_weight",
    "site_modules",
    "untouched_parameters",
    "walk",
    "within",
    "write_weight",
]

# Names of the parts that write back into the residual stream; everything else of that part reads from it.
OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "down_proj", "dense", "wo", "w2", "fc2", "fc_out", "dense_4h_to_h")
ATTENTION_NAMES = ("attn", "attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "moe", "expert")
ROUTER_NAMES = ("gate", "router", "router_gate", "shared_expert_gate")


@dataclass(frozen=True)
class Site:
    """One linear map: `name` in `model.named_modules()`, its block, its (out, in) shape, kind and fused group."""

    name: str
    block: int
    shape: tuple[int, int]
    kind: str  # attention_in | attention_out | mlp_in | mlp_out | other, or one of model/vocabulary
    fused: str  # sites with the same value share their input and must keep one scheme


@dataclass(frozen=True)
class Stage:
    """Sites of one block that share one input, in the order in which the block reaches them."""

    name: str  # name of its first site
    sites: tuple[Site, ...]

    @property
    def columns(self) -> int:
        return self.sites[0].shape[1]

    @property
    def rows(self) -> int:
        return sum(site.shape[0] for site in self.sites)


@dataclass(frozen=True)
class Block:
    """One repeated block: where it is in the module tree, and its stages."""

    index: int
    name: str
    stages: tuple[Stage, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for stage in self.stages for site in stage.sites)


def is_linear(module: nn.Module) -> bool:
    """A plain linear map: torch's, or GPT-2's transposed one."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


def site_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def read_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as a float32 (out, in) copy."""
    weight = module.weight.detach()
    weight = weight.T if is_transposed(module) else weight
    return weight.to(torch.float32, copy=True).contiguous()


def write_weight(module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Replace the weight, in the module's own layout, dtype and device.

    New memory, not the old one overwritten: that may be a page of the weights file (see paging).
    """
    if tuple(weight.shape) != site_shape(module):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} for a site of shape {site_shape(module)}")
    own = weight.T if is_transposed(module) else weight
    module.weight.data = own.detach().to(module.weight.device, module.weight.dtype, copy=True).contiguous()


def within(name: str) -> str:
    """A site's name inside its block: what follows the first number that stands alone; experts are one part."""
    pieces = name.split(".")
    first = next((index for index, piece in enumerate(pieces) if piece.isdigit()), -1)
    return ".".join("*" if piece.isdigit() else piece for piece in pieces[first + 1 :])


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the repeated blocks.

    Raises UserError when no list of like modules with linear maps exists.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        linears = sum(is_linear(child) for block in module for child in block.modules())
        alike = len({type(block) for block in module}) == 1
        if alike and linears and (best is None or linears > best[0]):
            best = (linears, name, module)
    if best is None:
        raise UserError(
            f"found no repeated blocks with linear layers in {type(model).__name__}",
            wanted="a decoder of the Llama, Mistral, Qwen, Gemma or GPT-2 kind",
        )
    return best[1], best[2]


def site_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map inside a block, by its full name, in module order."""
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if is_linear(module) and not is_router(name, module)
    }


def is_router(name: str, module: nn.Module) -> bool:
    """Whether a linear map scores experts: so named, and far fewer outputs than inputs."""
    rows, columns = site_shape(module)
    return name.rpartition(".")[2] in ROUTER_NAMES and 2 * rows <= columns


def untouched_parameters(model: nn.Module, blocks: tuple[Block, ...]) -> list[tuple[str, int]]:
    """(name, number of elements) of each parameter of two or more dimensions inside the blocks that is no site's
    weight: it stays in full precision.
    """
    prefix, _ = find_blocks(model)
    weights = {f"{site.name}.weight" for block in blocks for site in block.sites}
    return [
        (name, parameter.numel())
        for name, parameter in model.named_parameters()
        if name.startswith(f"{prefix}.") and parameter.ndim >= 2 and name not in weights
    ]


def kind_of(name: str) -> str:
    """attention or mlp, in or out, from the path inside the block."""
    *path, last = name.lower().split(".")
    attention = any(part in step for step in path for part in ATTENTION_NAMES)
    mlp = any(part in step for step in path for part in MLP_NAMES) or last in ("fc1", "fc2")
    if not (attention or mlp):
        return "other"
    side = "out" if last in OUTPUT_NAMES else "in"
    return f"{'attention' if attention else 'mlp'}_{side}"


@torch.no_grad()
def walk(model: nn.Module, probe: Int[Tensor, "n length"], pages: Pages = UNMAPPED) -> tuple[Block, ...]:
    """Blocks, stages and sites of `model`; `probe` is any short batch of valid tokens, `pages` its mapped weights.

    A site that the probe does not reach (an idle expert) gets a stage of its own at the end of its block.
    """
    prefix, blocks = find_blocks(model)
    modules = site_modules(model)
    names = {module: name for name, module in modules.items()}
    reached: dict[str, tuple] = {}

    def record(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        x = inputs[0] if inputs else next(iter(named.values()))
        # Keeping the tensor alive keeps its address its own until the block is done.
        reached.setdefault(names[module], (x, x.data_ptr(), tuple(x.shape), tuple(x.stride())))

    found: list[Block] = []

    def close(index: int) -> None:
        groups: dict[tuple, list[str]] = {}
        for name, (_, *key) in reached.items():
            groups.setdefault(tuple(key), []).append(name)
        here = f"{prefix}.{index}."
        ordered = list(groups.values()) + [[n] for n in modules if n.startswith(here) and n not in reached]
        stages = tuple(
            Stage(
                members[0],
                tuple(
                    Site(name, index, site_shape(modules[name]), kind_of(name.removeprefix(here)), members[0])
                    for name in members
                ),
            )
            for members in ordered
        )
        found.append(Block(index, f"{prefix}.{index}", stages))
        reached.clear()
        pages.release(blocks[index].parameters())

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules.values()]
    hooks += [block.register_forward_hook(lambda *_, index=index: close(index)) for index, block in enumerate(blocks)]
    try:
        model(probe.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(block.sites for block in found):
        raise UserError(f"no linear layer of {type(model).__name__} was reached by a forward pass")
    return tuple(sorted(found, key=lambda block: block.index))

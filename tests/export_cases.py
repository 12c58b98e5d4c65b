"""Quantized models for the export tests: plain round-to-nearest, so that no solver is needed."""

from __future__ import annotations

import torch
from torch import nn

from conftest import tiny_llama
from geoquant.lattice.grid import Grid
from geoquant.methods.problem import Solution


def rtn(weight, grid: Grid, kept=()) -> Solution:
    """Round-to-nearest; every other row gets negative steps (solvers produce them)."""
    rows, columns = weight.shape
    weight = weight.detach().float().clone()
    kept = torch.tensor(sorted(kept), dtype=torch.int64)
    kept_weight = weight[:, kept].bfloat16()
    weight[:, kept] = 0.0
    groups = grid.groups(columns)
    padded = nn.functional.pad(weight, (0, groups * grid.group_size - columns)).view(rows, groups, -1)
    if grid.symmetric:
        steps = padded.abs().amax(-1) / grid.highest
        steps = (steps * torch.tensor([1.0, -1.0]).repeat(rows)[:rows, None]).bfloat16()
        zero = None
        codes = padded / steps.float()[..., None]
    else:
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        steps = ((high - low) / grid.highest).bfloat16()
        zero = (-low / steps.float()).round().clamp(0, grid.highest)
        codes = padded / steps.float()[..., None] + zero[..., None]
        zero = zero.to(torch.uint8)
    codes = codes.round().clamp(grid.lowest, grid.highest).view(rows, -1)[:, :columns]
    return Solution(
        codes=codes.to(torch.int8 if grid.symmetric else torch.uint8),
        scales=steps,
        zero_points=zero,
        kept_index=kept,
        kept_weight=kept_weight,
        damping=0.01,
        gram_schmidt=torch.ones(columns),
        saturated=torch.zeros(rows),
        grid=grid,
    )


def values(solution: Solution) -> torch.Tensor:
    """The (out, in) float32 weights that codes, steps, zero points and kept columns mean."""
    group = torch.arange(solution.codes.shape[1]) // solution.grid.group_size
    out = solution.codes.float()
    if solution.zero_points is not None:
        out -= solution.zero_points.float()[:, group]
    out *= solution.scales.float()[:, group]
    for place, column in enumerate(solution.kept_index.tolist()):
        out[:, column] = solution.kept_weight[:, place].float()
    return out


def site_names(model) -> list[str]:
    """All linear sites of a Llama-like model."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def solve(model, grid_of, kept_of=lambda name, columns: ()) -> dict[str, Solution]:
    """Quantize every site of `model` in place; `grid_of(position)` and `kept_of(name, columns)` choose."""
    solutions = {}
    for position, name in enumerate(site_names(model)):
        module = model.get_submodule(name)
        solutions[name] = rtn(module.weight, grid_of(position), kept_of(name, module.in_features))
        module.weight.data.copy_(values(solutions[name]))
    return solutions


def small_llama(**changes):
    """A Llama whose columns (64 and 96) hold several groups of 32."""
    return tiny_llama(**({"hidden_size": 64, "intermediate_size": 96} | changes))


def probe(seed: int = 1) -> torch.Tensor:
    """(1, 40) tokens."""
    return torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    """Float32 logits of `model` on the probe."""
    return model(probe()).logits.float()

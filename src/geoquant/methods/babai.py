"""Boxed Babai (GPTQ): scales searched as the recursion reaches a group, damping chosen on held-out moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import NotPositiveDefinite, compensation_factor, heldout_prices, permuted, sample_stride
from geoquant.lattice.grid import Grid, search_scales
from geoquant.lattice.order import column_order
from geoquant.methods.problem import Problem, Solution

__all__ = ["DAMPINGS", "choose_damping", "least", "solve", "solve_with"]

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
DEFAULT_DAMPING = 0.01


def solve(problem: Problem) -> Solution:
    """Choose the damping if it is open, then solve on all moments.

    Raises NotPositiveDefinite when no damping of the list makes the metric factorisable.
    """
    return solve_with(problem, torch.zeros(0, dtype=torch.int64, device=problem.weight.device))


def solve_with(problem: Problem, kept: Int[Tensor, " k"]) -> Solution:
    """Boxed Babai with the columns `kept` ordered last and left continuous."""
    damping = choose_damping(problem, kept) if problem.damping is None else problem.damping
    return _solve(problem.weight, problem.pooled, problem, damping, kept)


def choose_damping(problem: Problem, kept: Int[Tensor, " k"]) -> float:
    """The lambda of DAMPINGS with the least expected error on the held-out moments.

    Solving on one set of tokens and paying on another has a closed form (`heldout_prices`), so no trial solve is
    needed. Kept columns are continuous and pay nothing.
    """
    if problem.heldout is None:
        return DEFAULT_DAMPING
    order = column_order(problem.order, problem.hessian, problem.grid.group_size, last=kept).flip(0)
    # Single precision suffices to rank dampings; the solve itself factorises in double.
    metric, heldout = permuted(problem.hessian, order), permuted(problem.heldout, order)

    stride = sample_stride(len(metric) - len(kept))
    free = len(kept)
    return least(lambda damping: heldout_prices(metric, heldout, damping, free=free, stride=stride)[0].sum().item())


def least(error: Callable[[float], float]) -> float:
    """The lambda of DAMPINGS where `error` is least: it falls, then rises, so walk downhill from the middle."""

    @cache
    def at(index: int) -> float:
        if not 0 <= index < len(DAMPINGS):
            return math.inf
        try:
            return error(DAMPINGS[index])
        except NotPositiveDefinite:
            return math.inf

    best = len(DAMPINGS) // 2
    while at(best) == math.inf and best + 1 < len(DAMPINGS):
        best += 1
    for step in (1, -1):
        while at(best + step) < at(best):
            best += step
    return DAMPINGS[best]


def _solve(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    problem: Problem,
    damping: float,
    kept: Int[Tensor, " k"],
) -> Solution:
    grid = problem.grid
    order = column_order(problem.order, hessian, grid.group_size, last=kept)
    factor = compensation_factor(hessian, order, damping)
    importance = hessian.diagonal()
    scales = zeros = None
    if problem.static_scales:
        scales, zeros = _static_scales(weight, importance, kept, problem.grid)
    result = boxed_babai(weight, factor, order, grid, importance, free=len(kept), scales=scales, zeros=zeros)
    codes, free = result.codes, result.free
    index = torch.sort(order[len(order) - len(kept) :])
    if len(kept):
        # The base checkpoint holds zero there; the columns themselves travel beside it.
        group = index.values // grid.group_size
        codes[index.values] = 0 if grid.symmetric else result.zeros[group].to(codes.dtype)
        free = free[index.indices]
    lengths = torch.empty_like(importance)
    lengths[order] = factor.diagonal().reciprocal()
    return Solution(
        codes=codes.T.contiguous(),
        scales=result.scales.T.to(torch.bfloat16).contiguous(),
        zero_points=None if result.zeros is None else result.zeros.T.to(torch.uint8).contiguous(),
        kept_index=index.values.to(torch.int64),
        kept_weight=free.T.to(torch.bfloat16).contiguous(),
        damping=damping,
        gram_schmidt=lengths,
        saturated=result.clipped / max(1, len(order) - len(kept)),
        grid=grid,
    )


def _static_scales(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"], kept: Int[Tensor, " k"], grid: Grid
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"] | None]:
    """Steps of the weights as they are; like the recursion's own search, without the kept columns."""
    on_grid = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    on_grid[kept] = False
    rows = weight.shape[0]
    found = []
    for columns in torch.arange(weight.shape[1], device=weight.device).split(grid.group_size):
        columns = columns[on_grid[columns]]
        if len(columns):
            found.append(search_scales(weight.T[columns].contiguous(), importance[columns], grid))
        else:
            found.append((weight.new_ones(rows), None if grid.symmetric else weight.new_zeros(rows)))
    scales = torch.stack([scale for scale, _ in found])
    return scales, None if grid.symmetric else torch.stack([zero for _, zero in found])

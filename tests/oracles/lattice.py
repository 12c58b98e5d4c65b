"""Closest-vector references: textbook Babai, GPTQ with an explicit inverse, enumeration, a dense step search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoquant.lattice.grid import Grid

__all__ = [
    "Recursion",
    "closest_vectors",
    "column_error",
    "dense_scale_error",
    "grid_error",
    "naive_gptq",
    "priced_codes",
    "random_metric",
    "textbook_babai",
]


def random_metric(columns: int, seed: int, *, rank: int | None = None, decades: float = 2.0) -> Tensor:
    """A float64 Gram matrix of correlated inputs whose scales spread over `decades` powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rank or 3 * columns, columns, generator=generator, dtype=torch.float64)
    mixing = (
        torch.eye(columns, dtype=torch.float64)
        + 0.5 * torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    )
    spread = torch.pow(10.0, decades * (torch.rand(columns, generator=generator, dtype=torch.float64) - 0.5))
    inputs = tokens @ mixing * spread
    return inputs.T @ inputs / len(inputs)


def column_error(difference: Tensor, metric: Tensor) -> Tensor:
    """`d^T A d` of every row d of `difference`."""
    return torch.einsum("ri,ij,rj->r", difference, metric, difference)


def textbook_babai(
    weight: Tensor, metric: Tensor, order: Tensor, steps: Tensor, grid: Grid, zeros: Tensor | None = None
) -> Tensor:
    """Codes (out, in) of Babai's nearest plane on the basis `R diag(s)`, last basis vector first, inside the box.

    `metric = R^T R` with R upper triangular; the basis vector that is decided first must come last, hence the flip.
    steps, zeros: (out, in) per weight. Babai 1986; the box clips each code (Chen et al. 2025).
    """
    backwards = order.flip(0)
    basis = torch.linalg.cholesky(metric[backwards][:, backwards]).T
    target = weight[:, backwards] @ basis.T
    codes = torch.zeros_like(weight)
    point = torch.zeros_like(weight)
    offset = torch.zeros_like(weight) if zeros is None else zeros
    for j in range(len(order) - 1, -1, -1):
        column = backwards[j]
        residual = target[:, j] - point[:, j + 1 :] @ basis[j, j + 1 :]
        center = residual / (basis[j, j] * steps[:, column])
        codes[:, column] = (center.round() + offset[:, column]).clamp(grid.lowest, grid.highest)
        point[:, j] = steps[:, column] * (codes[:, column] - offset[:, column])
    return codes


def priced_codes(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    order: Tensor,
    row_steps: Tensor,
    column_steps: Tensor,
    step: float,
    price: float,
    mu: float,
) -> Tensor:
    """Codes at the price `mu` of a bit, by the formulas: all weights as one vector in the metric `inputs (x) outputs`,
    its free part put to the least-squares minimiser by a dense solve after every code.

    Centre u, in steps, becomes round(u / (1 + mu / (2 ln 2 d v))), no further than one from u. d: squared step times
    squared length in both metrics times price, over step^2. v: the best rank-one fit, in the sense of
    `mean_j v_ij / (a_i b_j) = 1` and the same over i, of w^2 and of the roundings that rows and columns hand on to
    those after them, in squared steps.
    """
    flat = [torch.arange(len(outputs)), order]
    squares = []  # of Gram-Schmidt lengths: what is left of each dimension given those after it
    for metric, sequence in zip((outputs, inputs), flat):
        squares.append(torch.empty(len(metric), dtype=metric.dtype))
        for place, own in enumerate(sequence):
            part = metric[sequence[place:]][:, sequence[place:]]
            squares[-1][own] = torch.linalg.inv(part)[0, 0].reciprocal()
    rows, columns = squares[0] * row_steps**2, squares[1] * column_steps**2
    steps = row_steps[:, None] * column_steps
    row_errors, column_errors = torch.empty_like(rows), torch.empty_like(columns)
    for errors, metric, sequence, own in zip((row_errors, column_errors), (outputs, inputs), flat, (rows, columns)):
        handed = torch.linalg.inv(torch.linalg.cholesky(metric[sequence][:, sequence].flip(0, 1)).flip(0, 1))
        errors[sequence] = own[sequence] @ handed**2  # M^-1 = U^T U
    energy = (weight**2 + torch.outer(row_errors, column_errors) / 12) / steps**2
    v = torch.ones_like(energy)
    for _ in range(100):
        v = v * (energy / v).mean(1, keepdim=True)
        v = v * (energy / v).mean(0)
    d = torch.outer(rows, columns) * price / step**2
    by = (1 + mu / (2 * torch.tensor(2.0).log() * d * v))[:, order].T.flatten()
    metric, steps = torch.kron(inputs[order][:, order], outputs), steps[:, order].T.flatten()
    free, codes = weight[:, order].T.flatten(), torch.zeros(weight.numel(), dtype=weight.dtype)
    for k in range(len(free)):
        u = free[k] / steps[k]
        codes[k] = torch.clamp(u / by[k], u - 1, u + 1).round()
        if k + 1 < len(free):
            moved = torch.linalg.solve(metric[k + 1 :, k + 1 :], metric[k + 1 :, k])
            free[k + 1 :] += moved * (free[k] - codes[k] * steps[k])
    result = torch.empty_like(weight)
    result[:, order] = codes.view(len(order), -1).T
    return result


@dataclass(frozen=True)
class Recursion:
    """What the naive recursion found, in original column order; `values` are the weights a reader sees."""

    codes: Tensor
    values: Tensor
    scales: Tensor  # (groups, out)
    zeros: Tensor | None
    clipped: Tensor


def naive_gptq(
    weight: Tensor,
    metric: Tensor,
    order: Tensor,
    grid: Grid,
    *,
    free: int = 0,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    search: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> Recursion:
    """GPTQ, one column at a time: round, update everything that is left by the explicit inverse of its metric.

    search: (weights of a group's columns on the grid, their positions) -> steps and zero points, called on the fully
    updated weights when the first column of the group comes up.
    """
    work = weight.clone()
    rows, columns = weight.shape
    count = columns - free
    inverse = torch.linalg.inv(metric)
    codes = torch.zeros_like(work)
    clipped = torch.zeros(rows, dtype=torch.long)
    order = order.tolist()
    on_grid = set(order[:count])
    if scales is None:
        scales = torch.ones(grid.groups(columns), rows, dtype=work.dtype)
        zeros = None if grid.symmetric else torch.zeros_like(scales)
    seen: set[int] = set()
    for position in range(count):
        column, rest = order[position], order[position:]
        group = column // grid.group_size
        if search is not None and group not in seen:
            seen.add(group)
            members = [c for c in order if c // grid.group_size == group and c in on_grid]
            scales[group], zero = search(work[:, members].T.contiguous(), torch.tensor(members))
            if zero is not None:
                zeros[group] = zero
        offset = 0.0 if zeros is None else zeros[group]
        unboxed = (work[:, column] / scales[group]).round() + offset
        codes[:, column] = unboxed.clamp(grid.lowest, grid.highest)
        clipped += codes[:, column] != unboxed
        error = work[:, column] - (codes[:, column] - offset) * scales[group]
        work[:, rest] -= error[:, None] * inverse[column, rest] / inverse[column, column]
        # The inverse of the metric of the columns that are left (Frantar and Alistarh 2022, lemma 1).
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return Recursion(codes, work, scales, zeros, clipped)


def closest_vectors(weight: Tensor, metric: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """Least error of each row over every code in the box, by enumeration. steps: (out,), one per row."""
    choices = range(grid.lowest, grid.highest + 1)
    points = torch.tensor(list(itertools.product(choices, repeat=weight.shape[1])), dtype=weight.dtype)
    best = []
    for row, step in zip(weight, steps):
        best.append(column_error(points * step - row, metric).min())
    return torch.stack(best)


def grid_error(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Weighted squared error per row of rounding (columns, rows) weights to the nearest code in the box."""
    offset = 0.0 if zero is None else zero
    codes = ((weight / scale).round() + offset).clamp(grid.lowest, grid.highest) - offset
    return ((codes * scale - weight).square() * importance[:, None]).sum(0)


def dense_scale_error(weight: Tensor, importance: Tensor, grid: Grid, tries: int = 400) -> Tensor:
    """Least `grid_error` per row over a dense list of steps of both signs (and all zero points)."""
    if grid.symmetric:
        largest = weight.abs().amax(0)
        steps = [
            (sign * fraction * largest / grid.highest, None)
            for fraction in torch.linspace(0.1, 1.1, tries)
            for sign in (1, -1)
        ]
    else:
        span = weight.amax(0).clamp_min(0) - weight.amin(0).clamp_max(0)
        steps = [
            (fraction * span / grid.highest, torch.full_like(span, zero))
            for fraction in torch.linspace(0.2, 1.2, tries)
            for zero in range(grid.highest + 1)
        ]
    return torch.stack([grid_error(weight, importance, scale, zero, grid) for scale, zero in steps]).amin(0)

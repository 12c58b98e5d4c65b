"""Differentiated quantization and compensation: a few input columns stay at 16 bits and absorb the others' error.

Which columns: HOP (Hessian-orthogonal projection), the error that rounding column j alone would leave after every
other column has adapted, `||delta_j||^2 / [A^-1]_jj`, with delta the error of plain rounding. The kept columns O come
last in Babai's order and are left continuous, which makes them the exact minimiser
`W_O + (W_R - Q_R) A_RO A_OO^-1`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.lattice.basis import compensation_factor
from geoquant.methods import babai, rtn
from geoquant.methods.problem import Problem, Solution

__all__ = ["hop_scores", "kept_columns", "solve"]


def hop_scores(
    difference: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], damping: float
) -> Float[Tensor, " in"]:
    """Compensated error of each input column, in the units of the metric."""
    columns = torch.arange(len(hessian), device=hessian.device)
    factor = compensation_factor(hessian, columns, damping)
    inverse_diagonal = factor.square().sum(0)
    return difference.square().sum(0) / inverse_diagonal


def kept_columns(scores: Float[Tensor, " in"], share: float) -> Int[Tensor, " k"]:
    """The `share` of columns (at least one) with the largest scores, sorted by position."""
    count = min(max(1, math.ceil(share * len(scores) - 1e-9)), len(scores) - 1)
    return torch.sort(torch.topk(scores, count).indices).values


def solve(problem: Problem) -> Solution:
    """Score with round-to-nearest errors, keep the top columns, then boxed Babai on the rest."""
    # Plain rounding errors: a search weighted by diag(A) bends the step of a group to its dominant column, which
    # then looks cheap while its neighbours pay for it.
    plain = torch.eye(problem.weight.shape[1], device=problem.weight.device)
    rounded = rtn.solve(replace(problem, hessian=plain, heldout=None))
    damping = babai.DEFAULT_DAMPING if problem.damping is None else problem.damping
    scores = hop_scores(rounded.dequantize() - problem.weight, problem.pooled, damping)
    if problem.keep <= 0:
        return replace(babai.solve(problem), column_scores=scores)
    return replace(babai.solve_with(problem, kept_columns(scores, problem.keep)), column_scores=scores)

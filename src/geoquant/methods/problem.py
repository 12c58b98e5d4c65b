"""What a quantization method is given and what it gives back: tensors and intent, no model, no files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.certificate import Squares, squared_steps
from geoquant.lattice.grid import Grid
from geoquant.lattice.rows import RowMetric
from geoquant.lattice.unboxed import steps_of

__all__ = ["LatticeSolution", "Problem", "Solution"]


@dataclass(frozen=True)
class Problem:
    """One closest-vector problem: rows of `weight` against the metric `hessian` of their shared input.

    Sites that share an input are stacked along the rows (rows are independent given the metric).

    weight:   (out, in) float32, the target.
    hessian:  (in, in) float32, `A = sum_t w_t x_t x_t^T` over the calibration tokens.
    heldout:  the same sum over held-out tokens, or None.
    order:    natural | activation | group-aware | min-pivot.
    damping:  lambda in `A + lambda * mean(diag A) * I`, or None: chosen on `heldout`.
    keep:     share of input columns kept at 16 bits (used by `dqc` only).
    static_scales: freeze the scales of the original weights instead of searching them on the updated ones.
    tokens:   how many tokens the sums hold. For `lattice`, whose steps have units: step, the global D, and rows, the
              output side G of the metric. ties: columns with the same number get one step (see model/folding).
    """

    weight: Float[Tensor, "out in"]
    hessian: Float[Tensor, "in in"]
    heldout: Float[Tensor, "in in"] | None = None
    grid: Grid = field(default_factory=Grid)
    order: str = "group-aware"
    damping: float | None = None
    keep: float = 0.0
    static_scales: bool = False
    tokens: int = 1
    step: float = 1.0
    rows: RowMetric | None = None
    ties: Int[Tensor, " in"] | None = None

    @property
    def pooled(self) -> Float[Tensor, "in in"]:
        """The metric on all tokens: once the damping is chosen, held-out tokens are data like any other."""
        return self.hessian if self.heldout is None else self.hessian + self.heldout


@dataclass(frozen=True)
class Solution:
    """Codes and steps of a solved problem, all in the *original* column order.

    codes:        (out, in) int8 (symmetric) or uint8 (asymmetric); kept columns hold the code of zero.
    scales:       (out, groups) bfloat16; zero_points: (out, groups) uint8 or None when symmetric.
    kept_index:   (k,) int64 sorted input columns kept at 16 bits; kept_weight: (out, k) bfloat16.
    damping:      the lambda used.
    gram_schmidt: (in,) float32 `r_j`, Gram-Schmidt lengths of the damped metric in the order used, listed by column.
    saturated:    (out,) float32 share of each row's codes whose unclipped value lay outside the box.
    column_scores: (in,) float32 HOP score of each input column if the method computed it, else None.
    """

    codes: Integer[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zero_points: Integer[Tensor, "out groups"] | None
    kept_index: Int[Tensor, " k"]
    kept_weight: Float[Tensor, "out k"]
    damping: float
    gram_schmidt: Float[Tensor, " in"]
    saturated: Float[Tensor, " out"]
    grid: Grid
    column_scores: Float[Tensor, " in"] | None = None

    def dequantize(self, *, with_kept: bool = True) -> Float[Tensor, "out in"]:
        """The float32 weights a reader reconstructs; `with_kept=False` leaves the kept columns at zero."""
        from geoquant.lattice.grid import dequantize

        weight = dequantize(self.codes, self.scales, self.zero_points, self.grid.group_size)
        if self.kept_index.numel():
            weight[:, self.kept_index] = self.kept_weight.float() if with_kept else 0.0
        return weight

    @property
    def squares(self) -> Squares:
        """What the certificate is made of."""
        return squared_steps(self.scales, self.gram_schmidt, self.kept_index, self.grid.group_size)

    @property
    def basis_lengths(self) -> tuple[Float[Tensor, " rounded"], Float[Tensor, " rounded"]]:
        """`r_j`, and `r_j s_j` with the root mean square of the steps over rows, of the columns that are rounded."""
        rounded = torch.ones(len(self.gram_schmidt), dtype=torch.bool, device=self.gram_schmidt.device)
        rounded[self.kept_index] = False
        steps = self.scales.double().square().mean(0).sqrt().repeat_interleave(self.grid.group_size)
        lengths = self.gram_schmidt.double()
        return lengths[rounded], (lengths * steps[: len(lengths)])[rounded]

    def rows(self, start: int, stop: int) -> Solution:
        """The part that belongs to one of several stacked sites."""
        part = slice(start, stop)
        return Solution(
            codes=self.codes[part].clone(),
            scales=self.scales[part].clone(),
            zero_points=None if self.zero_points is None else self.zero_points[part].clone(),
            kept_index=self.kept_index,
            kept_weight=self.kept_weight[part].clone(),
            damping=self.damping,
            gram_schmidt=self.gram_schmidt,
            saturated=self.saturated[part].clone(),
            grid=self.grid,
            column_scores=self.column_scores,
        )


@dataclass(frozen=True)
class LatticeSolution:
    """A point of the unbounded lattice: `q_ij = 2^(row_exponents_i / 8) 2^(column_exponents_j / 8) codes_ij`.

    codes: (out, in) int8, int16 or int32, whatever holds them; exponents int16 (see lattice/unboxed); step: the global
    D in use; damping and gram_schmidt as in `Solution`; row_errors (2, out): 12 times the expected and 4 times the
    largest squared error of a row in a column with step one.
    """

    codes: Integer[Tensor, "out in"]
    row_exponents: Int[Tensor, " out"]
    column_exponents: Int[Tensor, " in"]
    step: float
    damping: float
    gram_schmidt: Float[Tensor, " in"]
    row_errors: Float[Tensor, "2 out"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 weights a reader reconstructs."""
        return self.codes.float().mul_(steps_of(self.row_exponents)[:, None]).mul_(steps_of(self.column_exponents))

    @property
    def squares(self) -> Squares:
        """As in `Solution`."""
        rows, columns = steps_of(self.row_exponents).double().square().sum(), self.basis_lengths[1].square()
        expected, worst = self.row_errors.double().sum(1)
        floor = len(columns) * columns.log().mean().exp()
        found = (rows * columns.sum(), rows * floor, expected * columns.sum(), worst * columns.sum())
        return Squares(*(value.item() for value in found))

    @property
    def basis_lengths(self) -> tuple[Float[Tensor, " in"], Float[Tensor, " in"]]:
        """`r_j` and `r_j s_j`, for a row of step one."""
        lengths = self.gram_schmidt.double()
        return lengths, lengths * steps_of(self.column_exponents).double()

    def rows(self, start: int, stop: int) -> LatticeSolution:
        """The part that belongs to one of several stacked sites."""
        part = slice(start, stop)
        return replace(
            self,
            codes=self.codes[part].clone(),
            row_exponents=self.row_exponents[part].clone(),
            row_errors=self.row_errors[:, part].clone(),
        )


def empty_kept(rows: int) -> tuple[Tensor, Tensor]:
    """No kept columns."""
    return torch.zeros(0, dtype=torch.int64), torch.zeros(rows, 0, dtype=torch.bfloat16)

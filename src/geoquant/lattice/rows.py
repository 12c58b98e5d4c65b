"""The output side of the metric: curvature of the rows, in diagonal blocks of neighbouring rows.

Errors of two outputs that feed the same softmax or the same residual direction do not add like strangers. Inside one
input column the rows are therefore rounded one after another too, each moved by the errors of those before it, in the
metric `G` of its block: Babai on the Kronecker lattice `G (x) A`, blocks apart. The Gram-Schmidt lengths of G are
shorter than the square roots of its diagonal, so rows get longer steps, and fewer bits, for the same expected loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["RowMetric", "block_sizes", "row_metric", "single_rows"]


@dataclass(frozen=True)
class RowMetric:
    """Factors of G by block.

    factor: (blocks, size, size) `U` upper triangular with `G^-1 = U^T U` in the order of the rows; blocks of fewer
            rows are filled up with the identity. sizes: rows of each block.
    """

    factor: Float[Tensor, "blocks size size"]
    sizes: tuple[int, ...]

    @property
    def strangers(self) -> bool:
        """Whether every row is a block of its own: no row moves another."""
        return self.factor.shape[1] == 1

    def spread(self, values: Float[Tensor, "blocks size"]) -> Float[Tensor, " rows"]:
        """One value per row, without what fills the blocks up."""
        if self.strangers:
            return values[:, 0]
        return torch.cat([part[:size] for part, size in zip(values, self.sizes)])

    @property
    def lengths(self) -> Float[Tensor, " rows"]:
        """Gram-Schmidt lengths of the rows."""
        return self.spread(self.factor.diagonal(dim1=1, dim2=2).reciprocal())

    @property
    def shares(self) -> Float[Tensor, "blocks size size"]:
        """`U_ki / U_kk`: how an error of row k moves row i, those after k."""
        return self.factor / self.factor.diagonal(dim1=1, dim2=2)[:, :, None]

    def by_block(self, values: Float[Tensor, " rows"], fill: float = 0.0) -> Float[Tensor, "blocks size"]:
        """What `spread` makes one value per row of."""
        padded = torch.full_like(self.factor[:, 0], fill, dtype=values.dtype)
        for block, part in enumerate(values.split(self.sizes)):
            padded[block, : len(part)] = part
        return padded

    def feedback(self, steps: Float[Tensor, " rows"]) -> Float[Tensor, "blocks size size"]:
        """The shares where each row's error is counted in its own steps."""
        units = self.by_block(steps, fill=1.0)
        return self.shares * units[:, :, None] / units[:, None, :]

    def error_squares(self, steps: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Twelve times the expected and four times the largest squared error of each row in one column.

        A row is off by its own rounding and, on purpose, by its share of the roundings before it:
        `e_i = sum_k d_k U_ki / U_kk` with `|d_k| <= s_k / 2`.
        """
        if self.strangers:
            return steps.square(), steps.square()
        shares = self.shares * self.by_block(steps)[:, :, None]
        return self.spread(shares.square().sum(1)), self.spread(shares.abs().sum(1).square())


def single_rows(weights: Float[Tensor, " rows"]) -> RowMetric:
    """A diagonal G: rows that are strangers to each other."""
    return RowMetric(weights.clamp_min(1e-30).rsqrt()[:, None, None], (1,) * len(weights))


def block_sizes(rows: list[int], size: int) -> tuple[int, ...]:
    """Rows of each block when sites with `rows` rows are stacked; no block belongs to two sites."""
    return tuple(min(size, count - start) for count in rows for start in range(0, count, size))


def row_metric(
    curvature: Float[Tensor, "blocks size size"],
    sizes: tuple[int, ...],
    *,
    floor: float,
    keep: float,
    sites: Sequence[int] | None = None,
) -> RowMetric:
    """Factorise means of `g g^T`, zero where a block has no rows, after making them trustworthy.

    floor: added to every diagonal entry, as a share of the mean diagonal of its block. sites: rows of each site;
           where every row is a block of its own, the mean of its site, as a share of itself would floor nothing.
    keep:  share of the off-diagonal entries that is believed; the rest is taken for noise of too few tokens.
    """
    size = curvature.shape[-1]
    held = torch.arange(size, device=curvature.device) < torch.tensor(sizes, device=curvature.device)[:, None]
    diagonal = curvature.diagonal(dim1=1, dim2=2).double()
    mean = diagonal.sum(1, keepdim=True) / held.sum(1, keepdim=True)
    if size == 1 and sites is not None:
        mean = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in mean.split(list(sites))])
    diagonal = diagonal + floor * mean
    # Whole blocks may be without any gradient (a pruned head): they count like a millionth of the largest.
    largest = diagonal.max()
    diagonal = torch.where(held, diagonal.clamp_min(torch.where(largest > 0, 1e-6 * largest, 1.0)), 1.0)
    metric = keep * curvature.double()
    metric.diagonal(dim1=1, dim2=2).copy_(diagonal)
    # (flip G) = L L^T gives G = V V^T with V upper triangular, and U = V^-1.
    lower = torch.linalg.cholesky(metric.flip(1, 2))
    identity = torch.eye(size, dtype=metric.dtype, device=metric.device).expand_as(metric)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2)
    # Blocks were filled up at the end: the identity part stays apart.
    return RowMetric(upper.to(torch.float32), sizes)

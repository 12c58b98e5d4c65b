"""Babai's nearest plane on the unbounded lattice with rank-one steps `s_ij = a_i b_j`.

No box, so nothing is clipped. With `b_j` proportional to `1/r_j` every
Gram-Schmidt length of the scaled basis is the same: the gap between arithmetic and geometric mean, which is all that
lattice reduction could ever close, is closed without any reduction. With `a_i = D G_ii^(-1/2)` and one D for the whole
model, every code of every site costs the same expected loss per bit: reverse water-filling in the metric `G (x) A`.

Steps are powers of 2^(1/8), rounded to bfloat16: a reader's cast to bf16 or fp32 keeps them, a byte names them, and a
step off by at most 4.4% costs less than 0.1% of error (the optimum is flat).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from geoquant.lattice.kernel import SUB, panel
from geoquant.lattice.rows import RowMetric, block_sizes
from geoquant.lattice.threads import in_parts

__all__ = ["Tariff", "exponents", "narrow", "steps_of", "unboxed_babai"]

PER_OCTAVE = 8
PANEL = 64
STRANGERS = 512  # rows that pass through a panel together where they need not know of each other
ROWS = 1 << 13


@dataclass(frozen=True)
class Tariff:
    """What codes cost and squares, as `kernel.panel` wants to know it; columns in their original order, float32 and
    int64 on the CPU."""

    row_costs: Float[Tensor, " out"]
    column_costs: Float[Tensor, " in"]
    saved: Float[Tensor, "classes reach"]
    row_class: Int[Tensor, " out"]
    column_class: Int[Tensor, " in"]

    def part(self, rows: slice = slice(None), columns: slice | Tensor = slice(None)) -> Tariff:
        """Of some rows and columns."""
        own = self.row_costs[rows], self.column_costs[columns], self.saved
        return Tariff(*own, self.row_class[rows], self.column_class[columns])


def exponents(steps: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The integers k of the nearest steps `2^(k/8)`, int16."""
    index = torch.round(PER_OCTAVE * torch.log2(steps.double()))
    return index.nan_to_num(0.0).clamp(-1000, 1000).to(torch.int16)  # beyond lie no float32 numbers


def steps_of(index: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`2^(k/8)` with its mantissa rounded to bfloat16's, exact in bfloat16 and float32."""
    index = index.to(torch.int32)
    octave = torch.div(index, PER_OCTAVE, rounding_mode="floor")
    mantissa = torch.exp2((index - PER_OCTAVE * octave).double() / PER_OCTAVE).to(torch.bfloat16).float()
    return torch.ldexp(mantissa, octave)


def unboxed_babai(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
    row_steps: Float[Tensor, " out"],
    column_steps: Float[Tensor, " in"],
    rows: RowMetric | None = None,
    tariff: Tariff | None = None,
) -> Integer[Tensor, "out in"]:
    """Codes z with `q_ij = row_steps_i column_steps_j z_ij`, Babai's plane by plane in `order`, in the smallest type
    that holds them.

    basis: `V` of `metric_factor`, in processing order. With errors `e = w - q`, component j of `e V` is
    `r_j (c_j - q_j)` with the centre `c_j = w_j + sum_{k<j} e_k V_kj / r_j`, to which q_j is rounded. GPTQ's updates
    with the inverse give the same centres; this form needs no inverse, and reads errors instead of rewriting weights.

    Column steps in the original order. rows: the output side of the metric; without it rows are strangers to each
    other. All rows are solved in units of their own step, so the recursion sees one step per column. Compiled on a CPU
    in float32, torch operations elsewhere. tariff: only where it is compiled.
    """
    if len(weight) > ROWS and (rows is None or rows.strangers):  # rows are solved alone: a few thousand at a time
        spans = [slice(start, start + ROWS) for start in range(0, len(weight), ROWS)]
        given = ((weight[own], basis, order, row_steps[own], column_steps) for own in spans)
        known = (tariff and tariff.part(own) for own in spans)
        return torch.cat([unboxed_babai(*part, tariff=own) for part, own in zip(given, known)])
    # Transposed, so that one column of the layer is one contiguous row of memory. Weights become errors.
    work = weight.T.contiguous().index_select(0, order).to(basis.dtype).div_(row_steps)
    columns, count = work.shape
    steps, lengths = column_steps[order].to(work.dtype), basis.diagonal()
    feedback, sizes = _feedback(rows, row_steps, work)
    codes = torch.empty(columns, count, dtype=torch.int32, device=weight.device)
    compiled = work.device.type == "cpu" and work.dtype == torch.float32
    for first in range(0, columns, PANEL):
        part = slice(first, min(first + PANEL, columns))
        shares = basis[: part.stop, part] / lengths[part]
        centres = torch.addmm(work[part], shares[:first].T, work[:first])
        given = (centres, work[part], steps[part], shares[first:], feedback, sizes)
        if compiled:
            codes[order[part]] = _compiled(*given, tariff and tariff.part(columns=order[part]))
        else:
            codes[order[part]] = _plain(*given)
    return narrow(codes).T.contiguous()


def narrow(codes: Int[Tensor, "out in"]) -> Integer[Tensor, "out in"]:
    """The smallest integer type that holds the codes."""
    least, most = codes.aminmax() if codes.numel() else (torch.tensor(0), torch.tensor(0))
    largest = max(-int(least), int(most))
    return codes.to(torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32)


def _feedback(
    rows: RowMetric | None, row_steps: Float[Tensor, " out"], work: Float[Tensor, "in out"]
) -> tuple[Float[Tensor, "blocks size size"], tuple[int, ...]]:
    """How a row's error moves those after it, both in units of their steps, filled up to a multiple of SUB rows; and
    the sizes of the blocks."""
    count = work.shape[1]
    if rows is None or rows.strangers:
        return work.new_empty(0, SUB, SUB), block_sizes([count], STRANGERS)
    steps = work.new_ones(rows.factor.shape[:2])
    for block, part in enumerate(row_steps.split(rows.sizes)):
        steps[block, : len(part)] = part
    unit = rows.factor / rows.factor.diagonal(dim1=1, dim2=2)[:, :, None]
    unit = (unit * steps[:, :, None] / steps[:, None, :]).to(work.dtype)
    more = -unit.shape[1] % SUB
    return torch.nn.functional.pad(unit, (0, more, 0, more)).contiguous(), rows.sizes


def _compiled(
    centres: Tensor,
    work: Tensor,
    steps: Tensor,
    shares: Tensor,
    feedback: Tensor,
    sizes: tuple[int, ...],
    tariff: Tariff | None,
) -> Tensor:
    codes = torch.empty(work.shape, dtype=torch.int32)
    given = [x.numpy() for x in (centres, work, codes, steps, shares.contiguous())]
    costs = [None] * 5 if tariff is None else [x.numpy() for x in vars(tariff).values()]
    factors, starts, counts = feedback.numpy(), np.array([0, *accumulate(sizes[:-1])]), np.array(sizes)
    in_parts(lambda own: panel(*given, factors[own], starts[own], counts[own], *costs), len(sizes))
    return codes


def _plain(
    centres: Tensor, work: Tensor, steps: Tensor, shares: Tensor, feedback: Tensor, sizes: tuple[int, ...]
) -> Tensor:
    """The same in torch operations, blocks side by side."""
    codes = torch.empty_like(work)
    size = feedback.shape[1]
    # Place of every row in the padded blocks.
    place = torch.cat([torch.arange(rows) + block * size for block, rows in enumerate(sizes)]).to(work.device)
    for j, step in enumerate(steps.tolist()):
        if not len(feedback):
            torch.div(centres[j], step, out=codes[j]).round_()
        else:
            target = work.new_zeros(len(sizes) * size).index_copy_(0, place, centres[j]).view(len(sizes), size)
            for i in range(size):
                rest = target[:, i] - (target[:, i] / step).round_() * step
                target[:, i + 1 :].addcmul_(rest[:, None], feedback[:, i, i + 1 :], value=-1.0)
            codes[j] = (target.flatten()[place] / step).round_()
        work[j].sub_(codes[j], alpha=step)
        if j + 1 < len(work):
            centres[j + 1 :].addr_(shares[j, j + 1 :], work[j])
    return codes.to(torch.int32)

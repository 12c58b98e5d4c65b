"""A run of the lattice as an ordinary int8 checkpoint: per-channel codes for readers that know nothing of lattices.

A weight is `a_i b_j Z_ij`. The column steps b move into the layers that make the inputs (model/folding), exactly up to
the rounding of norm gains; the row steps a, times what later layers moved here, are the channel scales; Z is the int8
code. What lies beyond int8 goes to an adapter, one column of it per input column with such a code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.lattice.grid import Grid
from geoquant.lattice.unboxed import PER_OCTAVE, steps_of
from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.folding import Fold, scaled_parameters
from geoquant.model.vocabulary import repeated
from geoquant.model.walk import Block

__all__ = ["Twin", "int8_twin"]

LIMIT = 127


@dataclass(frozen=True)
class Twin:
    """sites: per-channel int8 solutions by site name, made one at a time. replaced: float32 parameters, by name, that
    take the place of the model's. overflow: codes beyond int8 by site; where there are any, a site's solution keeps
    those columns *in addition* to its codes.
    """

    sites: Mapping[str, Solution]
    replaced: Mapping[str, Tensor]
    overflow: Mapping[str, int]


class _Sites(Mapping[str, Solution]):
    """Reads a stage when one of its sites is asked for."""

    def __init__(self, stages: Mapping[str, LatticeSolution], blocks: tuple[Block, ...], scales: Mapping[str, Tensor]):
        self._stages, self._scales = stages, scales
        self._places = {
            site.name: (stage.name, sum(other.shape[0] for other in stage.sites[:place]))
            for block in blocks
            for stage in block.stages
            for place, site in enumerate(stage.sites)
        }
        self._rows = {site.name: site.shape[0] for block in blocks for site in block.sites}

    def __getitem__(self, name: str) -> Solution:
        stage, start = self._places[name]
        solution = balanced(self._stages[stage])
        return channel_codes(solution.rows(start, start + self._rows[name]), self._scales.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def balanced(solution: LatticeSolution) -> LatticeSolution:
    """The same weights with column steps around one, so that gains keep their size and scales fit half precision: whole
    octaves move from the columns to the rows, which is exact.
    """
    octave = torch.round(solution.column_exponents.double().mean() / PER_OCTAVE).to(torch.int16) * PER_OCTAVE
    columns, rows = solution.column_exponents - octave, solution.row_exponents + octave
    return replace(solution, column_exponents=columns, row_exponents=rows)


def channel_codes(solution: LatticeSolution, later: Tensor | None) -> Solution:
    """One site without its column steps. later: what its rows take over from the layer after it."""
    codes = solution.codes.to(torch.int32)
    kept = codes.clamp(-LIMIT, LIMIT)
    rest = codes - kept
    columns = rest.any(0).nonzero()[:, 0]
    scale = steps_of(solution.row_exponents)
    if later is not None:
        scale = scale * later
    return Solution(
        codes=kept.to(torch.int8),
        scales=scale[:, None],
        zero_points=None,
        kept_index=columns,
        kept_weight=rest[:, columns].float() * scale[:, None],
        damping=solution.damping,
        gram_schmidt=solution.gram_schmidt,
        saturated=rest.ne(0).float().mean(1),
        grid=Grid(8, codes.shape[1], True),
    )


def int8_twin(
    model: nn.Module, blocks: tuple[Block, ...], stages: Mapping[str, LatticeSolution], folds: Mapping[str, Fold]
) -> Twin:
    """The twin of a solved model. blocks: with or without embedding and head, which are left as they are.

    Raises UserError where the columns of a stage have nowhere to go.
    """
    blocks = repeated(blocks)
    sites = {site.name for block in blocks for site in block.sites}
    scales: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    overflow: dict[str, int] = {}
    used: set[str] = set()
    for stage in (stage for block in blocks for stage in block.stages):
        solution = balanced(stages[stage.name])
        for site, codes in zip(stage.sites, solution.codes.split([site.shape[0] for site in stage.sites])):
            overflow[site.name] = int(((codes > LIMIT) | (codes < -LIMIT)).sum())
        fold = folds.get(stage.name)
        channels = fold and fold.channels(steps_of(solution.column_exponents))
        if channels is None or fold.module in used:
            raise UserError(
                f"the column steps of {stage.name} cannot be folded into the layer before it",
                fix="use --to int4, geoquant or dense"
                + ("" if fold is None else "; runs with --foldable have this form"),
            )
        used.add(fold.module)
        try:
            replaced |= scaled_parameters(model.get_submodule(fold.module), fold.module, channels)
        except ValueError as error:
            raise UserError(str(error), fix="use --to int4, geoquant or dense") from None
        if fold.module in sites:
            scales[fold.module] = channels
        elif fold.linear:
            raise UserError(
                f"{fold.module} makes the inputs of {stage.name} and was not quantized", fix="use --to dense"
            )
    return Twin(_Sites(stages, blocks, scales), replaced, overflow)

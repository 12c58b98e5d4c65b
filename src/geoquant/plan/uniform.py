"""The uniform plan: every site gets the same grid. `check_choices` looks at every choice before the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from geoquant.errors import UserError, unknown_name
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import ALONE, ORDERS
from geoquant.methods import METHODS, ROWS_ALONE
from geoquant.model.walk import Block, Stage
from geoquant.observe.moments import METRICS
from geoquant.recipe import Recipe

__all__ = ["Plan", "SitePlan", "check_choices", "kept_count", "uniform_plan"]


@dataclass(frozen=True)
class SitePlan:
    """What one site gets. `keep` is the share of input columns at 16 bits, `damping` None: chosen on held-out data."""

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    method: str
    bits: int | None  # None: unbounded codes
    group_size: int
    symmetric: bool
    order: str
    damping: float | None
    keep: float
    bits_per_weight: float
    reason: str

    @property
    def grid(self) -> Grid | None:
        """The box, or None on the unbounded lattice."""
        return None if self.bits is None else Grid(self.bits, self.group_size, self.symmetric)


@dataclass(frozen=True)
class Plan:
    """Site plans by name, in the order in which the model reaches the sites."""

    sites: tuple[SitePlan, ...]

    def __getitem__(self, name: str) -> SitePlan:
        return next(site for site in self.sites if site.name == name)

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights of all sites: codes, steps, zero points, kept columns and their positions."""
        weights = [math.prod(site.shape) for site in self.sites]
        return sum(site.bits_per_weight * n for site, n in zip(self.sites, weights)) / sum(weights)

    def settings(self, stage: Stage, *, static_scales: bool) -> tuple[str, dict]:
        """Method and `Problem` fields of a stage (its sites share one scheme)."""
        site = self[stage.name]
        if site.grid is None:
            return site.method, {"order": site.order, "damping": site.damping}
        return site.method, {
            "grid": site.grid,
            "order": site.order,
            "damping": site.damping,
            "keep": site.keep,
            "static_scales": static_scales,
        }

    def to_dict(self) -> dict:
        return {"bits_per_weight": self.bits_per_weight, "sites": [asdict(site) for site in self.sites]}


def kept_count(keep: float, columns: int) -> int:
    """Number of input columns kept at 16 bits."""
    return min(max(1, math.ceil(keep * columns - 1e-9)), columns - 1) if keep > 0 else 0


def check_choices(recipe: Recipe) -> None:
    """Raise UserError for unknown names, and for methods that need another option or do not go with one.

    What the grid and the other options say of each other the recipe itself has checked.
    """
    for kind, name, known in (
        ("method", recipe.method, METHODS),
        ("metric", recipe.metric, METRICS),
        ("order", recipe.order, ORDERS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if recipe.method in ROWS_ALONE and recipe.row_block != 1:
        raise UserError(
            f"method {recipe.method} solves every row by itself",
            got=f"--row-block {recipe.row_block}",
            fix="add --row-block 1",
        )
    if recipe.keep and recipe.method == "rtn":
        raise UserError("method rtn keeps no columns", got=f"--keep {recipe.keep}", fix="use --method dqc")
    if recipe.method == "dqc" and not recipe.keep:
        raise UserError("method dqc needs to know how many columns to keep", fix="add --keep 0.01 (one per cent)")


def uniform_plan(blocks: Sequence[Block], recipe: Recipe) -> Plan:
    """The same choices for every site.

    Raises UserError for a group larger than a site's columns, before anything runs.
    """
    if recipe.grid == "lattice":
        return lattice_plan(blocks, recipe)
    method = "dqc" if recipe.keep else recipe.method
    grid = Grid(recipe.bits, recipe.group_size, recipe.symmetric)
    plans = []
    for block in blocks:
        for site in block.sites:
            columns = site.shape[1]
            if recipe.group_size > columns:
                raise UserError(
                    f"group size {recipe.group_size} is larger than the {columns} columns of {site.name}",
                    fix=f"use --group-size {min(columns, 64)}",
                )
            kept = kept_count(recipe.keep, columns)
            # A kept column costs 16 bits a row instead of its code, and 16 bits to name it.
            bits = grid.bits_per_weight(columns) + (kept * (16 - grid.bits) + 16 * kept / site.shape[0]) / columns
            plans.append(
                SitePlan(
                    name=site.name,
                    block=block.index,
                    kind=site.kind,
                    shape=site.shape,
                    method=method,
                    bits=recipe.bits,
                    group_size=recipe.group_size,
                    symmetric=recipe.symmetric,
                    order=recipe.order if method != "rtn" else ALONE,
                    damping=recipe.damping,
                    keep=recipe.keep,
                    bits_per_weight=bits,
                    reason=_reason(recipe, method, kept, columns),
                )
            )
    return Plan(tuple(plans))


def lattice_plan(blocks: Sequence[Block], recipe: Recipe) -> Plan:
    """One lattice for the whole model: every site gets what falls out of the global step, on average the rate."""
    order = "activation" if recipe.order == "group-aware" else recipe.order  # no groups: the same order
    order = ALONE if recipe.method == "lattice-rtn" else order
    sites = (
        SitePlan(
            name=site.name,
            block=site.block,
            kind=site.kind,
            shape=site.shape,
            method=recipe.method,
            bits=None,
            group_size=0,
            symmetric=True,
            order=order,
            damping=recipe.damping,
            keep=0.0,
            bits_per_weight=recipe.rate,
            reason=f"one lattice for the whole model at {recipe.rate:g} bits per weight",
        )
        for block in blocks
        for site in block.sites
    )
    return Plan(tuple(sites))


def _reason(recipe: Recipe, method: str, kept: int, columns: int) -> str:
    shape = "symmetric" if recipe.symmetric else "asymmetric"
    text = f"uniform: {recipe.bits}-bit {shape} codes, one step per {recipe.group_size} columns"
    return f"{text}; the {kept} of {columns} columns with the largest HOP score stay at 16 bits" if kept else text

"""A run that does what a plan file says: every stage at the rate, and every weight as far from the base, as was chosen.

What the plan was made for is checked by hash before anything long is done. That no plan goes on silently in a run that
was started with another one, the manifest sees to: it holds the file's hash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded
from geoquant.model.vocabulary import ends
from geoquant.model.walk import Block
from geoquant.plan.chosen import Chosen, read_plan
from geoquant.plan.uniform import Plan
from geoquant.recipe import Recipe

__all__ = ["check_options", "check_planned", "check_planned_base", "missed", "plan_entry", "planned", "with_rates"]

AMISS = 0.01  # share of its rate by which a stage may miss it before the report says so


def planned(recipe: Recipe) -> Chosen | None:
    """The plan file that the recipe names. Raises UserError where it is missing or damaged."""
    return None if recipe.plan is None else read_plan(Path(recipe.plan))


def check_options(recipe: Recipe, chosen: Chosen, split: Split | None) -> tuple[str, ...]:
    """Raise UserError where the plan lacks what it needs, or what serves nothing is given; before a model is read.
    Returns what the report should warn of."""
    if chosen.anchors and recipe.base is None:
        raise UserError(
            f"the plan {recipe.plan} puts weights back towards a public base",
            wanted="--base MODEL, the one it was made with",
        )
    for name in () if recipe.refine else ("private", "domain"):
        if getattr(recipe, name) is not None:
            raise UserError(
                f"--{name} serves geoquant plan, and quantize with --refine", got="--plan", fix=f"leave out --{name}"
            )
    if split is not None and chosen.looked:
        return (
            "the plan looked at private records and does not say at which: of those that are audited too the audit "
            "says how well these are protected, not how well others are",
        )
    return ()


def check_planned(chosen: Chosen, loaded: Loaded) -> None:
    """Raise UserError where the plan is of another model, or of other parameters than the model has."""
    own = {name for name, _ in loaded.model.named_parameters()}
    chosen.check(model_hash(loaded.model), chosen.sha256["base"])  # the base itself is checked where it is read
    if other := sorted(own ^ chosen.shares.keys()):
        lacks, has = ("the plan", "the model") if other[0] in own else ("the model", "the plan")
        raise UserError(f"{lacks} has no parameter {other[0]}, which {has} has", fix="run geoquant plan again")


def check_planned_base(chosen: Chosen, loaded: Loaded, base: Loaded) -> None:
    """Raise UserError where the plan goes back to another base. loaded: the model, checked before."""
    chosen.check(chosen.sha256["model"], model_hash(base.model))


def with_rates(plan: Plan, blocks: Sequence[Block], chosen: Chosen) -> Plan:
    """The plan of the sites with the rates of their stages. Raises UserError where these are not the model's."""
    rates, stages = chosen.bits, {stage.name for block in blocks for stage in block.stages}
    if other := sorted(rates.keys() ^ stages):
        lacks = "the model" if other[0] in rates else "the plan"
        last = {stage.name for stage in ends(tuple(blocks))}
        whole = "geoquant plan leaves embeddings and head out with --no-embeddings, and so must quantize"
        vocabulary = set(other) <= last or not last
        raise UserError(
            f"{lacks} has no stage {other[0]} to be solved at a rate",
            fix=whole if vocabulary else "run geoquant plan on this model",
        )
    of = {site.name: stage.name for block in blocks for stage in block.stages for site in stage.sites}
    sites = (
        replace(site, bits_per_weight=bits, reason=f"{bits:g} bits per weight, as planned")
        for site in plan.sites
        for bits in (rates[of[site.name]],)
    )
    return Plan(tuple(sites))


def plan_entry(chosen: Chosen, sha256: str, blocks: Sequence[Block], sites: Sequence[Mapping]) -> dict:
    """The `plan` part of report.json. sites: its entries of what each site got."""
    got = {site["name"]: site["bits_per_weight"] * math.prod(site["shape"]) for site in sites}
    stages = []
    for stage in (stage for block in blocks for stage in block.stages):
        bits = sum(got[site.name] for site in stage.sites) / (stage.rows * stage.columns)
        stages.append({"name": stage.name, "planned": chosen.bits[stage.name], "got": bits})
    weights = {stage.name: stage.rows * stage.columns for block in blocks for stage in block.stages}
    asked = sum(bits * weights[name] for name, bits in chosen.bits.items())
    whole = chosen.totals.get("size", asked)
    return {
        "sha256": sha256,
        "effects_sha256": chosen.sha256["effects"],
        "looked": chosen.looked,
        "anchors": chosen.anchors,
        "budgets": dict(chosen.budgets),
        "totals": dict(chosen.totals),
        "bytes": {"planned": whole / 8, "got": (whole - asked + sum(got.values())) / 8},
        "stages": stages,
    }


def missed(stages: Sequence[Mapping]) -> list[str]:
    """A warning where stages have another rate than planned."""
    off = [stage for stage in stages if abs(stage["got"] / stage["planned"] - 1) > AMISS]
    if not off:
        return []
    worst = max(off, key=lambda stage: abs(stage["got"] / stage["planned"] - 1))
    return [
        f"{len(off)} of {len(stages)} stages missed their planned rate by more than {AMISS:.0%}, the most "
        f"{worst['name']}: {worst['got']:.3f} bits per weight instead of {worst['planned']:g}"
    ]

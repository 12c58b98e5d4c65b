"""Weights that go back towards the public base while they are solved: one target and one metric for every layer.

What is not a layer of a block (embeddings, head, norms, biases), and layers that not every token reaches, go back by
plain shares: before anything is solved (anchoring.py), and where they are solved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.anchoring import long_enough, part_of
from geoquant.data.records import read_records
from geoquant.errors import UserError
from geoquant.lattice.basis import NotPositiveDefinite, damped
from geoquant.methods.babai import DEFAULT_DAMPING
from geoquant.model.load import Loaded, load
from geoquant.model.paging import Pages, map_weights
from geoquant.model.walk import Stage, read_weight
from geoquant.observe.moments import Moments
from geoquant.observe.replay import Replay
from geoquant.observe.side import side_moments
from geoquant.observe.stream import Stream, open_stream
from geoquant.observe.texts import Sequences, heldout_start, padded
from geoquant.privacy.anchor import anchored
from geoquant.privacy.scoring import encode
from geoquant.privacy.shifted import combined, parts
from geoquant.recipe import Recipe

__all__ = ["Combining", "Shifted", "accounted", "check_combining", "combining"]

SIDES = ("domain", "private")
RECORDS = 256  # of a side, at most


@dataclass(frozen=True)
class Shifted:
    """What a stage is solved for instead, and the account: squared lengths by row, of the change since the base as it
    was (`change`) and as it is (`left`), plainly and as inputs see them (see `Combining.shifted`).
    """

    weight: Float[Tensor, "out in"]
    moments: Moments
    account: dict[str, Float[Tensor, " out"]]


@dataclass(frozen=True)
class Combining:
    """The base, and the records that pass through the model beside the calibration windows.

    share: of the private metric, in (0, 1], in units in which both metrics have the same trace.
    """

    share: float
    base: nn.Module
    pages: Pages
    texts: Mapping[str, Sequences]
    streams: Mapping[str, Stream]
    compute: torch.dtype
    dtype: torch.dtype

    def shifted(
        self,
        stage: Stage,
        weight: Float[Tensor, "out in"],
        original: Float[Tensor, "out in"],
        moments: Moments,
        work: nn.Module,
        site: str,
        passes: Sequence[Replay],
        damping: float | None,
    ) -> Shifted:
        """What to solve `stage` for, where `weight` and `moments` would be it without records.

        original: what the fine-tune has here, for the account. work, site, passes: the block, the stage's name inside
        it, and the records' way through it, in the order of `streams`. The function's metric is half the given one and
        half that of the domain records' inputs, the trace of either as given. All metrics are damped alike (damping;
        None: 1% of their mean), so that directions that no text uses go back by the share.
        """
        modules = [self.base.get_submodule(one.name) for one in stage.sites]
        public = torch.cat([read_weight(module) for module in modules]).to(weight.device)
        self.pages.release(module.weight for module in modules)
        base = public + (weight - original)  # what makes up for drifted inputs does so for either wish
        seen = {}
        for (name, text), own in zip(self.texts.items(), passes, strict=True):
            found = side_moments(
                work,
                site,
                own,
                text,
                heldout_start(len(text.tokens)),
                keep=len(stage.sites) == 1,
                compute=self.compute,
                dtype=self.dtype,
            )
            seen[name] = found
        account = {"change": _squares(original - public)}
        damping = DEFAULT_DAMPING if damping is None else damping
        try:
            one = self._combined(weight, base, moments, seen, damping)
        except NotPositiveDefinite:  # the solver says what is wrong with the metric
            one = None
        if one is None:
            target = anchored(weight, base, 1 - self.share)
            return Shifted(target, moments, account | {"left": _squares(target - base)})
        target, posed, function, private = one
        for name, metric in (("function", function), ("private", private)):
            account |= {name: _squares(weight - base, metric), f"{name}_left": _squares(target - base, metric)}
        return Shifted(target, posed, account | {"left": _squares(target - base)})

    def _combined(
        self,
        weight: Float[Tensor, "out in"],
        base: Float[Tensor, "out in"],
        moments: Moments,
        seen: Mapping[str, Moments | None],
        damping: float,
    ) -> tuple[Tensor, Moments, Tensor, Tensor] | None:
        """Target, moments of the combined metric, and the metrics of function and of private records; None where
        records do not reach the site. Raises NotPositiveDefinite."""
        if None in seen.values():
            return None
        function = _mixed(moments, seen["domain"], 0.5)
        factors = function and parts(_pooled(function), _pooled(seen["private"]), self.share)
        if not factors:
            return None
        metrics = _pooled(function), _pooled(seen["private"])
        near, back = (part * damped(one, damping) for part, one in zip(factors, metrics, strict=True))
        return combined(weight, base, near, back).target, _mixed(function, seen["private"], self.share), *metrics


def _pooled(moments: Moments) -> Float[Tensor, "in in"]:
    return moments.hessian if moments.heldout is None else moments.hessian + moments.heldout


def _mixed(first: Moments, second: Moments, share: float) -> Moments | None:
    """The first with the second's share in its sums, both in and out of what is held out."""
    factors = parts(_pooled(first), _pooled(second), share)
    if factors is None:
        return None
    if first.heldout is None:
        return replace(first, hessian=factors[0] * first.hessian + factors[1] * _pooled(second))
    sums = (first.hessian, second.hessian), (first.heldout, second.heldout)
    hessian, heldout = (factors[0] * own + factors[1] * other for own, other in sums)
    return replace(first, hessian=hessian, heldout=heldout)


def _squares(rows: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | None = None) -> Float[Tensor, " out"]:
    """Squared length of each row."""
    return ((rows if metric is None else rows @ metric) * rows).sum(1, dtype=torch.float64).clamp_min(0)


def check_combining(recipe: Recipe) -> None:
    """Raise UserError for levers that do not go with `--aim metric`."""
    if recipe.aim != "metric":
        return
    for name, why in (
        ("forget", "--forget moves whole models, and with --aim metric there is none before layers are solved"),
        ("refine", "--refine keeps codes to a model, and with --aim metric there is none that they were solved for"),
    ):
        if getattr(recipe, name):
            raise UserError(why, got=f"--aim metric --{name}", fix=f"leave out --{name}, or use --aim memory")


def combining(recipe: Recipe, loaded: Loaded, compute: torch.dtype, pages: Pages) -> Combining | None:
    """What `solve_model` is to do beside, if anything: loads the base, and opens streams of the records."""
    if not recipe.anchor or recipe.aim != "metric":
        return None
    base = load(recipe.base).model  # wherever the model is: its weights are asked for stage by stage
    texts = {}
    for name in SIDES:
        records = read_records(getattr(recipe, name))
        records = records[:: -(-len(records) // RECORDS)]  # what passes through beside is in memory throughout
        encoded = encode(loaded.tokenizer, records, recipe.window)
        texts[name] = padded(long_enough(name, encoded), 0)  # any token does for padding: nothing real sees it
    streams = {
        name: open_stream(loaded.model, text.tokens, compute, pages, size=text.batch) for name, text in texts.items()
    }
    moments = getattr(torch, recipe.moments)
    return Combining(recipe.anchor, base, map_weights(base), texts, streams, compute, moments)


def accounted(protection: dict | None, sites: Sequence[Mapping]) -> dict | None:
    """What the report says of the levers, with what layers did that went back while they were solved.

    sites: their entries. `kept` is told: the root mean over layers of the squared share of its length that the change
    since the base keeps, as private inputs see it and as the others do. Layers that had not changed are counted apart.
    """
    if protection is None or protection.get("aim") != "metric":
        return protection
    found = [(site["name"], site["anchored"]) for site in sites if site.get("anchored")]
    lengths = {
        when: math.sqrt(protection["distance"][when] ** 2 + sum(own[name] for _, own in found))
        for when, name in (("before", "change"), ("after", "left"))
    }
    moved = {part_of(f"{name}.weight"): 1.0 for name, _ in found}
    changed = [own for _, own in found if own["change"]]
    known = [own for own in changed if own.get("private") and own.get("function")]
    kept = {
        name: math.sqrt(sum(own[f"{name}_left"] / own[name] for own in known) / len(known)) if known else None
        for name in ("private", "function")
    }
    by_share = sum("private" not in own for own in changed)
    told = {"layers": len(known), "by_share": by_share, "unchanged": len(found) - len(changed), **kept}
    return protection | {"distance": lengths, "moved": protection["moved"] | moved, "kept": told}

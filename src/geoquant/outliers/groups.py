"""Which weights are treated together when it is asked what weights are for.

    site              every linear map alone
    half              attention and feed-forward part of every block
    block             all linear maps of a block
    depth:K           the model cut into K stretches of as many blocks, attention and feed-forward part of each: the
                      same 2K groups in every model, however deep, so that labels of models can be compared
    columns:N         N blocks of neighbouring input columns of every site
    top:SCORE@SHARE   of every site the share of its input columns with the largest score and, as the control, as many
                      drawn at random from all of them

A group that shares its size and its site with a random one tells what the score adds: whatever treating so many columns
of this site does anyway, the control does as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.errors import UserError, unknown_name
from geoquant.model.walk import Site, within
from geoquant.outliers.interventions import Part, block_of_columns, largest

__all__ = ["GROUPINGS", "RANDOM", "TOP", "Group", "Grouping", "make_groups", "parse_grouping"]

GROUPINGS = ("site", "half", "block", "depth:K", "columns:N", "top:SCORE@SHARE")
TOP, RANDOM = "top", "random"
COUNTED = {"columns": "columns:N with a whole number N", "depth": "depth:K with a whole number K"}
EXAMPLES = "site, half, block, depth:8, columns:4, top:dsm@0.01"


@dataclass(frozen=True)
class Group:
    """Parts that are changed together. kind: what it has in common with its like in other blocks; role: TOP, RANDOM or
    none.
    """

    name: str
    parts: tuple[Part, ...]
    block: int
    kind: str
    role: str = ""


@dataclass(frozen=True)
class Grouping:
    """A name of GROUPINGS without its values, and those: count of stretches or column blocks; score and share of top
    columns.
    """

    name: str
    count: int = 0
    score: str = ""
    share: float = 0.0

    def __str__(self) -> str:
        rest = dict.fromkeys(COUNTED, f":{self.count}") | {"top": f":{self.score}@{self.share:g}"}
        return self.name + rest.get(self.name, "")


def parse_grouping(text: str) -> Grouping:
    """A grouping as a person writes it. Raises UserError for an unknown one and for values out of range."""
    name, _, rest = text.strip().partition(":")
    wrong = UserError(f"cannot read --groups {text}", wanted=f"one like {EXAMPLES}")
    if name in ("site", "half", "block"):
        if rest:
            raise wrong
        return Grouping(name)
    if name in COUNTED:
        if not rest.isdecimal() or int(rest) < 1:
            raise UserError(f"--groups {text}", wanted=f"{COUNTED[name]} of 1 or more")
        return Grouping(name, count=int(rest))
    if name != "top":
        raise unknown_name("grouping", name, [one.partition(":")[0] for one in GROUPINGS])
    score, _, share = rest.rpartition("@")
    try:
        value = float(share)
    except ValueError:
        raise wrong from None
    if not score:
        raise wrong
    if not 0 < value <= 1:
        raise UserError(f"--groups {text}", got=f"a share of {share}", wanted="above 0 and at most 1")
    return Grouping(name, score=score, share=value)


def make_groups(
    grouping: Grouping,
    sites: Sequence[Site],
    scored: Callable[[Site], Float[Tensor, " in"]] | None = None,
    seed: int = 0,
) -> tuple[Group, ...]:
    """The groups of a model with these sites, in the order of its blocks.

    scored: a site's columns under the score of a `top` grouping. Raises UserError for more blocks of columns than a
    site has columns, and more stretches of depth than the model has blocks.
    """
    if grouping.name == "site":
        return tuple(Group(site.name, (Part(site.name),), site.block, within(site.name)) for site in sites)
    if grouping.name in ("half", "block"):
        return _together(sites, grouping.name == "half")
    if grouping.name == "depth":
        return _stretches(sites, grouping.count)
    if grouping.name == "columns":
        return tuple(group for site in sites for group in _column_blocks(site, grouping.count))
    return tuple(group for site in sites for group in _chosen(site, scored(site), grouping, seed))


def _together(sites: Sequence[Site], halves: bool) -> tuple[Group, ...]:
    found: dict[tuple[int, str], list[Part]] = {}
    for site in sites:
        kind = site.kind.partition("_")[0] if halves else "block"
        found.setdefault((site.block, kind), []).append(Part(site.name))
    return tuple(
        Group(f"block {block} {kind}" if halves else f"block {block}", tuple(parts), block, kind)
        for (block, kind), parts in found.items()
    )


def _stretches(sites: Sequence[Site], count: int) -> tuple[Group, ...]:
    """`attention 1/8`, `mlp 1/8`, ...; experts are the feed-forward part of their block."""
    blocks = sorted({site.block for site in sites})
    if count > len(blocks):
        raise UserError(f"--groups depth:{count}", got=f"{len(blocks)} blocks", wanted="at least one in each stretch")
    stretch = {block: place * count // len(blocks) for place, block in enumerate(blocks)}
    found: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        found.setdefault((stretch[site.block], site.kind.partition("_")[0]), []).append(site)
    return tuple(
        Group(f"{kind} {place + 1}/{count}", tuple(Part(site.name) for site in own), own[0].block, kind)
        for (place, kind), own in found.items()
    )


def _column_blocks(site: Site, count: int) -> list[Group]:
    size = site.shape[1]
    if count > size:
        raise UserError(f"{site.name} has {size} columns", wanted="at least one in each block", fix="use a smaller N")
    ends = [size * i // count for i in range(count + 1)]
    parts = [block_of_columns(site.name, start, stop) for start, stop in pairwise(ends)]
    return [Group(part.name, (part,), site.block, within(site.name)) for part in parts]


def _chosen(site: Site, scores: Float[Tensor, " in"], grouping: Grouping, seed: int) -> list[Group]:
    if tuple(scores.shape) != (site.shape[1],):
        raise ValueError(f"scores of shape {tuple(scores.shape)} for {site.shape[1]} columns of {site.name}")
    top = largest(site.name, scores, grouping.share, f"top {100 * grouping.share:g}% by {grouping.score}")
    own = hashlib.sha256(f"{site.name} {seed} control".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(own[:7], "big"))
    drawn = torch.randperm(site.shape[1], generator=generator)[: len(top.columns)].sort().values
    control = Part(site.name, columns=drawn, label=f"random {100 * grouping.share:g}%")
    kind = within(site.name)
    return [Group(part.name, (part,), site.block, kind, role) for part, role in ((top, TOP), (control, RANDOM))]

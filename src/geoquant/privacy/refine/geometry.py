"""The geometry term of refinement: rows whose rounding error stands out in the metric of their inputs pay for it.

    MD_i  = |(I - U_i U_i^T) (q_i - w_i) R| / |n_i|,     R^2 = A_g,   n_i = (I - U_i U_i^T) (w_i - c_i) R
    L_geo = 1/N sum_i max(0, MD_i - tau_i)^2 / 2         over the N rows of all sites inside the blocks

U_i spans the tangent space at row i of the site's rows, c_i is the mean of its neighbours (geometry/tangent), and A_g
the token-weighted metric that the original has on public text. No MD depends on its scale. tau_i is the `quantile` of
MD in the row's class (outliers/fsgd: bulk, core, island, spike, by the site's own cutoffs) at the codes of the solver,
or one number for all; rows with the highest public Fisher of their site have it lowered. The slope is closed form, and
zero up to the threshold:

    dL_geo / dq_i = 1/N (MD_i - tau_i)_+ / (MD_i |n_i|^2) ((I - U_i U_i^T) (q_i - w_i) R) R

What it can add and what it cannot. A tangent space of a few neighbours takes little from an error that has hundreds of
directions, so MD is near to the length of the error over the row's distance from its neighbours: without a metric, the
relative rounding error, and a pull on it is a pull back towards nearest rounding, against what the solver made up for
on purpose. With the metric, MD is the root of the row's output error as far as its own layer goes, which is what the
solver has made small in sum. So the term knows no function that the solver did not; it is another norm of the same
error: the sum does not mind one bad row, the hinge does. It keeps the worst rows, and those that public text leans on,
from paying for what divergence and privacy gain elsewhere. It sees no other layer, and no text while codes move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.geometry.metric import metric_root
from geoquant.geometry.tangent import NEIGHBOURS, Frames, frames, neighbours
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.backward import backward
from geoquant.observe.texts import Sequences
from geoquant.outliers.fsgd import CLASSES, classify, cutoffs, measured
from geoquant.outliers.statistics import SMALL

__all__ = ["Bounds", "Cloud", "Geometry", "begin_geometry", "hinge", "observe_clouds", "thresholds"]

LEAST = 3  # rows of a site, below which nothing is near anything
PIECE = 1 << 24  # numbers of neighbours at once


@dataclass(frozen=True)
class Bounds:
    """Who pays. quantile: of MD within a class, above which a row does. threshold: one MD for all classes instead.
    lowered: by which share, for rows of high public Fisher: those above the `high` quantile of their site's."""

    quantile: float = 0.9
    threshold: float | None = None
    lowered: float = 0.25
    high: float = 0.75

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("quantile", "lowered", "high")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"shares lie between 0 and 1, but got {wrong}")


@dataclass(frozen=True)
class Cloud:
    """A stage's rows as points in the metric of their inputs, and what public text says of them.

    root: of `A_g`, scaled to a mean diagonal of one. near: each row's neighbours among the rows of its site. weights:
    of its tangent space (`tangent.Frames`). normals: its own distance from there, infinite for a row that lies inside.
    silent: share of tokens whose input is next to nothing. fisher: `sum_t g_i^2 |x_t|^2` of each row, the diagonal
    empirical Fisher of its weights, summed.
    """

    root: Float[Tensor, "in in"]
    near: Int[Tensor, "out k"]
    weights: Float[Tensor, "out k k"]
    normals: Float[Tensor, " out"]
    silent: Float[Tensor, " in"]
    fisher: Float[Tensor, " out"]

    def parts(
        self, weight: Float[Tensor, "out in"], change: Float[Tensor, "out in"]
    ) -> Iterator[tuple[slice, Float[Tensor, "b in"]]]:
        """The normal part of every row's change in the metric, a few hundred rows at a time."""
        points, moved = weight @ self.root, change @ self.root
        step = max(1, PIECE // (self.near.shape[1] * points.shape[1]))
        for first in range(0, len(points), step):
            own = slice(first, first + step)
            offsets = points[self.near[own].long()]
            centres = offsets.mean(1)
            frame = Frames(torch.arange(len(points))[own], centres, offsets - centres[:, None], self.weights[own], None)
            yield own, frame.normals(moved[own, None])[:, 0]

    def distortion(self, weight: Float[Tensor, "out in"], change: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """MD of every row; zero for one that lies in its tangent space, whose MD is not defined."""
        lengths = torch.cat([normal.norm(dim=1) for _, normal in self.parts(weight, change)])
        return lengths / self.normals


def hinge(
    cloud: Cloud, weight: Float[Tensor, "out in"], change: Float[Tensor, "out in"], tau: Float[Tensor, " out"]
) -> tuple[float, Float[Tensor, "out in"]]:
    """`sum_i (MD_i - tau_i)_+^2 / 2` of a stage, and its gradient by the change."""
    value, pulls = 0.0, torch.zeros_like(weight)
    for own, normal in cloud.parts(weight, change):
        lengths = normal.norm(dim=1)
        above = (lengths / cloud.normals[own] - tau[own]).clamp_min(0.0)
        value += above.double().square().sum().item() / 2
        pulls[own] = (above / (lengths * cloud.normals[own]).clamp_min(1e-30))[:, None] * normal
    return value, pulls @ cloud.root


def thresholds(
    cloud: Cloud,
    weight: Float[Tensor, "out in"],
    change: Float[Tensor, "out in"],
    sites: tuple[int, ...],
    bounds: Bounds = Bounds(),
) -> tuple[Float[Tensor, " out"], Int[Tensor, " out"]]:
    """tau of every row of a stage, and its class (index into `fsgd.CLASSES`). sites: rows of each."""
    md, metric = cloud.distortion(weight, change), cloud.root @ cloud.root
    taus, labels = torch.empty_like(md), torch.zeros(len(md), dtype=torch.long, device=md.device)
    start = 0
    for count in sites:
        own, start = slice(start, start + count), start + count
        found, _ = measured(weight[own], change[own], metric, cloud.silent, axis="row")
        labels[own] = classify(found, cutoffs([found])).to(labels.device)
        for one in labels[own].unique():
            members = labels[own] == one
            tau = bounds.threshold
            if tau is None:
                tau = torch.quantile(md[own][members], bounds.quantile).item()
            taus[own][members] = tau
        fisher = cloud.fisher[own]
        taus[own][fisher > torch.quantile(fisher, bounds.high)] *= 1.0 - bounds.lowered
    return taus, labels


@dataclass(frozen=True)
class Geometry:
    """The term of a whole model. clouds: by stage; taus, labels: of its rows. wanted: the weights that codes
    stand for."""

    clouds: Mapping[str, Cloud]
    wanted: Callable[[Stage], Float[Tensor, "out in"]]
    stages: tuple[Stage, ...]
    taus: dict[str, Float[Tensor, " out"]]
    labels: dict[str, Int[Tensor, " out"]]

    @property
    def rows(self) -> int:
        return sum(len(tau) for tau in self.taus.values())

    def value(self, model: nn.Module) -> float:
        """L_geo of the weights that are in the model."""
        found = (hinge(*self._given(model, stage), self.taus[stage.name])[0] for stage in self.stages)
        return sum(found) / max(1, self.rows)

    def gradient(self, model: nn.Module, stage: Stage) -> Float[Tensor, "out in"]:
        """Of L_geo by the weights of a stage that has thresholds; others are not looked at."""
        return hinge(*self._given(model, stage), self.taus[stage.name])[1] / self.rows

    def account(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """By class of rows: how many there are, the mean MD, and the share above their threshold."""
        above, md, labels = [], [], []
        for stage in self.stages:
            md.append(self.clouds[stage.name].distortion(*self._given(model, stage)[1:]))
            above.append(md[-1] > self.taus[stage.name])
            labels.append(self.labels[stage.name])
        if not labels:
            return {}
        above, md, labels = torch.cat(above).double(), torch.cat(md).double(), torch.cat(labels)
        return {
            name: {
                "rows": int(own.sum()),
                "distortion": md[own].mean().item(),
                "above": above[own].mean().item(),
            }
            for index, name in enumerate(CLASSES)
            if (own := labels == index).any()
        }

    def _given(self, model: nn.Module, stage: Stage) -> tuple[Cloud, Tensor, Tensor]:
        weight = self.wanted(stage)
        return self.clouds[stage.name], weight, weights_in(model, stage) - weight


def begin_geometry(
    model: nn.Module,
    blocks: tuple[Block, ...],
    clouds: Mapping[str, Cloud],
    wanted: Callable[[Stage], Float[Tensor, "out in"]],
    bounds: Bounds = Bounds(),
) -> Geometry:
    """With thresholds from the codes that are in the model, which are to be the solver's."""
    stages = tuple(stage for block in blocks for stage in block.stages if stage.name in clouds)
    taus, labels = {}, {}
    for stage in stages:
        weight = wanted(stage)
        change = weights_in(model, stage) - weight
        sites = tuple(site.shape[0] for site in stage.sites)
        taus[stage.name], labels[stage.name] = thresholds(clouds[stage.name], weight, change, sites, bounds)
    return Geometry(clouds, wanted, stages, taus, labels)


def weights_in(model: nn.Module, stage: Stage) -> Float[Tensor, "out in"]:
    """What the model holds of a stage."""
    return torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])


def observe_clouds(
    model: nn.Module, blocks: tuple[Block, ...], text: Sequences, compute: torch.dtype = torch.float32
) -> Iterator[tuple[str, Cloud]]:
    """The clouds of a full-precision model's stages, those of one block in memory: one backward pass over public text.

    blocks: those that repeat. Stages with a site of fewer than three rows, or that no token reached, have none.
    """
    sums: dict[str, dict[str, Tensor]] = {}

    def see(_: str, __: int, site: str, x: Tensor, g: Tensor) -> None:
        energies, squares = g.square(), x.square()
        roots = x * energies.sum(1, keepdim=True).sqrt()
        unit = SMALL * squares.mean().sqrt()
        found = {
            "metric": roots.T @ roots,
            "fisher": energies.T @ squares.sum(1),
            "silent": (x.abs() < unit).sum(0).float(),
            "tokens": torch.tensor(float(len(x))),
        }
        known = sums.setdefault(site, found)
        if known is not found:
            for name, value in found.items():
                known[name] += value

    for block in backward(model, blocks, {"public": text}, see, compute=compute):
        for stage in block.stages:
            own = [sums.pop(site.name, None) for site in stage.sites]
            if all(own) and min(site.shape[0] for site in stage.sites) >= LEAST:
                yield stage.name, _cloud(weights_in(model, stage), stage, own)


def _cloud(weight: Float[Tensor, "out in"], stage: Stage, sums: list[dict[str, Tensor]]) -> Cloud:
    metric = sum(one["metric"].double() for one in sums)
    metric = metric / (metric.trace() / len(metric)).clamp_min(1e-300)
    root = metric_root(metric).float()
    points = weight @ root
    k = min(NEIGHBOURS, min(site.shape[0] for site in stage.sites) - 1)
    near, weights, normals, start = [], [], [], 0
    for site in stage.sites:
        own, start = points[start : start + site.shape[0]], start + site.shape[0]
        near.append((neighbours(own, k) + start - site.shape[0]).int())
        for part in frames(own, k):
            offset = own[part.points] - part.centres
            distance = part.normal_squares(offset)[0]
            inside = distance <= 1e-8 * offset.square().sum(1)  # within single precision nothing is left of it
            weights.append(part.weights)
            normals.append(torch.where(inside, torch.inf, distance.sqrt()))
    fisher = torch.cat([one["fisher"] for one in sums])
    silent = sums[0]["silent"] / sums[0]["tokens"].to(root.device)
    return Cloud(root, torch.cat(near), torch.cat(weights), torch.cat(normals), silent, fisher)

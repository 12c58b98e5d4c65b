"""Manifold distortion in the metric of the inputs, by classes of rows, beside its null.

Rows are mapped through a root of the metric, `A = L L^T`, so that `|x L|^2 = x^T A x` is the change of a row's output;
neighbours, tangent spaces and distortion are then those of the mapped rows. The null is noise of a random direction, as
long in every row as the change *before* the map: what a rounding that avoids the directions the inputs use would gain
on it shows in MD, what it gains by lying in the tangent space shows in the normal share alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.geometry.distortion import Distortion, distortions
from geoquant.geometry.nulls import matched_noise
from geoquant.geometry.tangent import NEIGHBOURS, SHARE

__all__ = ["Comparison", "JudgedDistortion", "judged_distortion", "metric_root", "outlier_rows", "output_energy"]

DRAWS = 3
FLOOR = 1e-12  # of the largest eigenvalue: below is rounding


@dataclass(frozen=True)
class Comparison:
    """MD of a set of rows against that of noise as long.

    md, share: medians over the rows. null_md, null_share: the same of noise. ratio: geometric mean over the rows of MD
    over its null (all draws' geometric mean), with `error`, the standard error of its logarithm. rows: how many have
    one; rows that did not change, or that lie in their tangent space, have none.
    """

    md: float
    share: float
    null_md: float
    null_share: float
    ratio: float
    error: float
    rows: int


@dataclass(frozen=True)
class JudgedDistortion:
    """MD of each row and of each draw of the null, and what they come to over all rows and over each class."""

    found: Distortion
    nulls: tuple[Distortion, ...]
    rows: Int[Tensor, " m"]
    whole: Comparison
    classes: dict[str, Comparison]


def metric_root(metric: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The symmetric root of a positive semidefinite metric; no damping, a metric of low rank has a root.

    Raises ValueError where an eigenvalue is below zero by more than rounding.
    """
    values, vectors = torch.linalg.eigh(metric.double())
    if values[0] < -1e-5 * values[-1].abs():
        raise ValueError(f"a metric has no negative eigenvalue, but got {values[0].item():.3g}")
    values = torch.where(values > FLOOR * values[-1], values, 0.0)
    return ((vectors * values.sqrt()) @ vectors.T).to(metric.dtype)


def judged_distortion(
    weight: Float[Tensor, "out in"],
    changed: Float[Tensor, "out in"],
    generator: torch.Generator,
    metric: Float[Tensor, "in in"] | None = None,
    classes: dict[str, Int[Tensor, " some"]] | None = None,
    rows: Int[Tensor, " m"] | None = None,
    k: int = NEIGHBOURS,
    share: float = SHARE,
    draws: int = DRAWS,
) -> JudgedDistortion:
    """MD of a changed matrix, of all rows or of `rows`, beside noise of the same length.

    metric: of the inputs; None: Euclidean. classes: which rows belong to each; they may overlap and leave rows out, and
    of them only those in `rows` count.
    """
    root = None if metric is None else metric_root(metric)

    def mapped(points: Tensor) -> Tensor:
        return points if root is None else points @ root

    changes = changed - weight
    noises = (matched_noise(changes, generator) for _ in range(draws))
    found, *nulls = distortions(mapped(weight), [mapped(changes), *map(mapped, noises)], k, share, rows)
    rows = torch.arange(len(weight), device=weight.device) if rows is None else rows
    members = {name: torch.isin(rows, own) for name, own in (classes or {}).items()}
    judged = {name: _comparison(found, nulls, chosen) for name, chosen in members.items()}
    whole = _comparison(found, nulls, torch.ones_like(rows, dtype=torch.bool))
    return JudgedDistortion(found, tuple(nulls), rows, whole, judged)


def outlier_rows(weight: Float[Tensor, "out in"], share: float = 0.05) -> Int[Tensor, " m"]:
    """The rows of the largest kurtosis, at least one: those that a few large weights stand out of."""
    centred = weight - weight.mean(1, keepdim=True)
    kurtosis = centred.pow(4).mean(1) / centred.square().mean(1).square().clamp_min(1e-30)
    return kurtosis.topk(max(1, round(share * len(weight)))).indices.sort().values


def output_energy(weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]) -> float:
    """`tr(W A W^T)`, the energy of the outputs: what the distortions of attention's two sides are weighted by."""
    return ((weight @ metric) * weight).sum().item()


def _comparison(found: Distortion, nulls: list[Distortion], chosen: Tensor) -> Comparison:
    """Medians, and the mean logarithm of MD over its null, of the chosen rows."""
    null_md = torch.stack([null.md for null in nulls]).log().mean(0).exp()
    null_share = torch.stack([null.share for null in nulls]).mean(0)
    logs = (found.md.double() / null_md).log()
    usable = chosen & logs.isfinite()
    if not usable.any():
        return Comparison(*[math.nan] * 6, rows=0)
    logs = logs[usable]
    columns = (found.md, found.share, null_md, null_share)
    medians = [column[usable].median().item() for column in columns]
    error = (logs.std() / len(logs) ** 0.5).item() if len(logs) > 1 else math.nan
    return Comparison(*medians, ratio=logs.mean().exp().item(), error=error, rows=len(logs))

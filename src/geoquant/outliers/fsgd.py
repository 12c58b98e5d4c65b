"""FSGD: which groups of a site's weights are spikes, islands, functional core or bulk, by four measures.

    curvature   c = sum_i delta_i^T A_g delta_i / ||delta||^2     rounding error in the token-weighted metric
    alignment   a = ||W U_k||^2 / ||W||^2 / (k / in)              weights in the k leading eigenvectors of A_g
    sparsity    s = share of tokens with |x_j| < 0.01 RMS         inputs that the group reads, weighted by w_ij^2
    isolation   local outlier factor of the rows, or of the columns, of W, or of their directions

with delta and W zero outside the group. A spike is curved above all; an island stands alone, reads what is mostly
silent and is not curved; the core is aligned; the rest is bulk. Alignment is a multiple of what a random direction has,
which is small in any space of many dimensions.

Cutoffs are quantiles, so that every site has its one percent of spikes, one without any structure too. Numbers of
groups therefore stand beside those that the null reaches by the same cutoffs; or the cutoffs are quantiles of the null.

Two of the measures say less than their names. Isolation of rows is mostly their length (`Classes.lengths`), which
directions are free of. Alignment of a single column does not depend on its weights: it is the column's part of the
eigenvectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.geometry.islands import NEIGHBOURS, local_outlier_factor, rank_correlation
from geoquant.geometry.lanczos import Eigenpairs, top_eigenpairs
from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.score import GROUP

__all__ = [
    "CLASSES",
    "Classes",
    "Cutoffs",
    "Measures",
    "Thresholds",
    "classify",
    "cutoffs",
    "fsgd",
    "measured",
    "measures",
]

CLASSES = ("bulk", "core", "island", "spike")
LEADING = 32


@dataclass(frozen=True)
class Thresholds:
    """Quantiles over the groups, each between 0 and 1.

    spike: of curvature, above it a spike. flat: of curvature, an island is not above it. isolated, sparse: an island is
    above both. aligned: the core is above it.
    """

    spike: float = 0.99
    flat: float = 0.90
    isolated: float = 0.90
    sparse: float = 0.90
    aligned: float = 0.90

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"a quantile is between 0 and 1, but {name}={value}")


@dataclass(frozen=True)
class Measures:
    """The four measures, one number per group, and the Euclidean length of each group's weights.

    curvature: nats^2 per token and squared unit of the weights, zero where there is no error. level: the same of a
    random direction, `tr A_g / in`; curvatures are compared with cutoffs as multiples of it.
    """

    curvature: Float[Tensor, " groups"]
    alignment: Float[Tensor, " groups"]
    sparsity: Float[Tensor, " groups"]
    isolation: Float[Tensor, " groups"]
    length: Float[Tensor, " groups"]
    level: float

    @property
    def sharpness(self) -> Float[Tensor, " groups"]:
        """Curvature as a multiple of that of a random direction."""
        return self.curvature / max(self.level, 1e-300)


@dataclass(frozen=True)
class Cutoffs:
    """The thresholds in units of the measures; curvatures as multiples of the level."""

    spike: float
    flat: float
    isolated: float
    sparse: float
    aligned: float


@dataclass(frozen=True)
class Classes:
    """What the groups of one site are.

    labels: index into `CLASSES` per group. counts: groups per class. null_counts: mean over nulls, by the same cutoffs.
    leading: eigenpairs used for the alignment, residual: the largest of theirs, 0 where they were solved densely.
    lengths: Spearman correlation of isolation and length, null_lengths: the same in the nulls; near 1 says that
    isolation is length.
    """

    axis: str
    size: int
    measures: Measures
    cutoffs: Cutoffs
    labels: Int[Tensor, " groups"]
    counts: dict[str, int]
    null_counts: dict[str, float]
    leading: int
    residual: float
    lengths: float
    null_lengths: float


def fsgd(
    context: SiteContext,
    generator: torch.Generator,
    *,
    axis: str = "column",
    size: int = GROUP,
    thresholds: Thresholds = Thresholds(),
    by_null: bool = False,
    given: Cutoffs | None = None,
    leading: int = LEADING,
    nulls: int = 1,
    unit: bool = False,
) -> Classes:
    """Classes of a site's groups of `size` neighbouring input columns, or of its rows (`axis="row"`, size 1).

    by_null: take the quantiles of the nulls, so that a class holds more than its share only where there is more of it
    than in a site without structure. given: cutoffs from elsewhere (of all sites of a model, say) instead.
    unit: isolation of directions, whatever the lengths.
    """
    own, pairs = measures(context, axis, size, leading, unit)
    others = [measures(null_context(context, generator), axis, size, leading, unit)[0] for _ in range(nulls)]
    cuts = given or cutoffs(others if by_null else [own], thresholds)
    labels = classify(own, cuts)
    beside = [_counted(classify(other, cuts)) for other in others]
    lengths = [rank_correlation(one.isolation, one.length) for one in (own, *others)]
    return Classes(
        axis=axis,
        size=size if axis == "column" else 1,
        measures=own,
        cutoffs=cuts,
        labels=labels,
        counts=_counted(labels),
        null_counts={name: sum(one[name] for one in beside) / max(1, nulls) for name in CLASSES},
        leading=len(pairs.values),
        residual=pairs.residuals.max().item() if len(pairs.residuals) else 0.0,
        lengths=lengths[0],
        null_lengths=sum(lengths[1:]) / nulls if nulls else float("nan"),
    )


def measures(
    context: SiteContext, axis: str = "column", size: int = GROUP, leading: int = LEADING, unit: bool = False
) -> tuple[Measures, Eigenpairs]:
    """The four measures of every group, and the eigenpairs of the metric that the alignment is taken in.

    Raises ValueError for another axis than `column` and `row`.
    """
    text = context.public
    metric, silent = text.weighted.double() / text.tokens, text.silent.double() / text.tokens
    return measured(context.weight, context.delta, metric, silent, axis, size, leading, unit)


def measured(
    weight: Float[Tensor, "out in"],
    delta: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    silent: Float[Tensor, " in"],
    axis: str = "column",
    size: int = GROUP,
    leading: int = LEADING,
    unit: bool = False,
) -> tuple[Measures, Eigenpairs]:
    """The same of matrices alone. metric: `A_g`, per token. silent: share of tokens whose input is next to nothing."""
    if axis not in ("column", "row"):
        raise ValueError(f"groups are along 'column' or 'row', not {axis!r}")
    weight, delta, metric, silent = weight.double(), delta.double(), metric.double(), silent.double()
    pairs = _eigenpairs(metric, min(leading, len(metric)))
    vectors = pairs.vectors.to(weight)
    energies = weight.square()
    points = weight if axis == "row" else weight.T
    if unit:
        points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-300)
    factor = local_outlier_factor(points, min(NEIGHBOURS, len(points) - 1)).to(weight)
    if axis == "row":
        error = ((delta @ metric) * delta).sum(1), delta.square().sum(1)
        inside, whole = (weight @ vectors).square().sum(1), energies.sum(1)
        quiet, isolation = energies @ silent, factor
    else:
        cuts = [slice(start, start + size) for start in range(0, weight.shape[1], size)]
        parts = [delta[:, cut] for cut in cuts]
        error = (
            torch.stack([(part.T @ part * metric[cut, cut]).sum() for part, cut in zip(parts, cuts)]),
            torch.stack([part.square().sum() for part in parts]),
        )
        inside = torch.stack([(weight[:, cut] @ vectors[cut]).square().sum() for cut in cuts])
        columns = energies.sum(0)
        whole = torch.stack([columns[cut].sum() for cut in cuts])
        quiet = torch.stack([columns[cut] @ silent[cut] for cut in cuts])
        isolation = torch.stack([factor[cut].mean() for cut in cuts])
    if vectors.shape[1] == len(metric):
        inside = whole  # of the whole space by definition; rounding would make differences between groups
    found = Measures(
        curvature=error[0] / error[1].clamp_min(1e-300),
        alignment=inside / whole.clamp_min(1e-300) * (len(metric) / max(1, vectors.shape[1])),
        sparsity=quiet / whole.clamp_min(1e-300),
        isolation=isolation,
        length=whole.sqrt(),
        level=metric.trace().item() / len(metric),
    )
    return found, pairs


def _eigenpairs(metric: Float[Tensor, "n n"], k: int) -> Eigenpairs:
    """By Lanczos; densely where that does not converge."""
    found = top_eigenpairs(lambda v: metric @ v, len(metric), k, device=metric.device)
    if found.converged:
        return found
    values, vectors = torch.linalg.eigh(metric)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    return Eigenpairs(values, vectors, torch.zeros(k), k, found.products, values[0].item(), True)


def cutoffs(of: Sequence[Measures], thresholds: Thresholds = Thresholds()) -> Cutoffs:
    """The thresholds' quantiles over the groups of one or several sites."""

    def quantile(name: str, share: float) -> float:
        return torch.quantile(torch.cat([getattr(one, name) for one in of]), share).item()

    return Cutoffs(
        spike=quantile("sharpness", thresholds.spike),
        flat=quantile("sharpness", thresholds.flat),
        isolated=quantile("isolation", thresholds.isolated),
        sparse=quantile("sparsity", thresholds.sparse),
        aligned=quantile("alignment", thresholds.aligned),
    )


def classify(of: Measures, cuts: Cutoffs) -> Int[Tensor, " groups"]:
    """Index into `CLASSES` of every group: spikes first, then islands, then the core."""
    spike = of.sharpness > cuts.spike
    island = (of.isolation > cuts.isolated) & (of.sparsity > cuts.sparse) & (of.sharpness <= cuts.flat)
    core = of.alignment > cuts.aligned
    labels = torch.zeros(len(of.curvature), dtype=torch.long, device=of.curvature.device)
    for index, members in ((1, core), (2, island), (3, spike)):
        labels[members] = index
    return labels


def _counted(labels: Int[Tensor, " groups"]) -> dict[str, int]:
    return dict(zip(CLASSES, labels.bincount(minlength=len(CLASSES)).tolist()))

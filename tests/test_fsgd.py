"""Classes of groups: each measure by its definition, planted spikes, islands and core, and sites that hold nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geoquant.geometry.islands import local_outlier_factor
from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.fsgd import CLASSES, Cutoffs, Thresholds, classify, cutoffs, fsgd, measures
from geoquant.outliers.statistics import summarise

ROWS, COLUMNS, TOKENS = 60, 48, 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def site(seed=0, rows=ROWS, columns=COLUMNS, scale=None, silent=(), weight=None):
    """A site of random weights and inputs; `scale` of the inputs, columns in `silent` see nothing but 2% of tokens."""
    draw = generator(seed)
    x = torch.randn(TOKENS, columns, generator=draw) * (1 if scale is None else scale)
    for column in silent:
        x[torch.rand(TOKENS, generator=draw) > 0.02, column] = 0
    g = torch.randn(TOKENS, rows, generator=draw)
    weight = torch.randn(rows, columns, generator=draw) if weight is None else weight
    delta = (torch.rand(rows, columns, generator=draw) - 0.5) * 0.1
    return SiteContext("site", "mlp_in", weight, delta, summarise(x, g, x.square().mean().sqrt().item())), x, g


@pytest.mark.parametrize(("axis", "size"), [("row", 1), ("column", 1), ("column", 10)])
def test_measures_are_those_defined(axis, size):
    """Each group's weights and error alone in a matrix of zeros, and sums over tokens."""
    context, x, g = site(silent=(3, 4, 20))
    found, pairs = measures(context, axis, size, leading=5)
    metric = torch.einsum("t,ti,tj->ij", g.double().square().sum(1), x.double(), x.double()) / TOKENS
    vectors = torch.linalg.eigh(metric).eigenvectors[:, -5:]
    silent = (x.abs() < 0.01 * x.square().mean().sqrt()).double().mean(0)
    assert silent[3] > 0.9
    factor = local_outlier_factor(context.weight if axis == "row" else context.weight.T)
    groups = torch.arange(ROWS if axis == "row" else COLUMNS).split(size)
    assert len(found.curvature) == len(groups)
    for index, members in enumerate(groups):
        mask = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        mask[(members, slice(None)) if axis == "row" else (slice(None), members)] = 1
        w, delta = context.weight * mask, context.delta * mask
        share = w.square() / w.square().sum()
        expected = {
            "curvature": torch.einsum("oi,ij,oj->", delta, metric, delta) / delta.square().sum(),
            "alignment": (w @ vectors).square().sum() / w.square().sum() / (5 / COLUMNS),
            "sparsity": (share * silent).sum(),
            "isolation": factor[members].mean(),
            "length": w.norm(),
        }
        for name, value in expected.items():
            assert getattr(found, name)[index].item() == pytest.approx(value.item(), rel=1e-4), name
    assert found.level == pytest.approx(metric.trace().item() / COLUMNS, rel=1e-5)
    assert pairs.converged


def test_random_weights_are_aligned_as_a_random_direction_is():
    context, *_ = site(rows=400)
    assert measures(context, "row", leading=6)[0].alignment.mean().item() == pytest.approx(1, abs=0.06)
    assert measures(context, "column", 1, leading=6)[0].alignment.mean().item() == pytest.approx(1, rel=1e-6)


def planted():
    """Columns 0: a strong input. 10-12: weights alone in a corner, read by nothing. The rest is noise."""
    scale = torch.ones(COLUMNS)
    scale[0] = 30
    weight = torch.randn(ROWS, COLUMNS, generator=generator(5))
    weight[:, 10:13] *= torch.tensor([6.0, 9.0, 12.0])
    return site(scale=scale, silent=(10, 11, 12), weight=weight)[0]


@pytest.mark.parametrize(("by_null", "chance"), [(False, 3), (True, 0.5)])
def test_planted_columns_get_their_names(by_null, chance):
    """By the site's own quantiles, which its many plain columns set low, the null has islands too."""
    thresholds = Thresholds(spike=0.97, isolated=0.9, sparse=0.9, aligned=0.85)
    found = fsgd(planted(), generator(), size=1, thresholds=thresholds, leading=4, by_null=by_null, nulls=8)
    names = [CLASSES[label] for label in found.labels]
    assert names[0] == "spike"
    assert [index for index, name in enumerate(names) if name == "island"] == [10, 11, 12]
    assert found.counts["island"] == 3
    assert found.null_counts["island"] < chance
    assert sum(found.counts.values()) == COLUMNS
    assert sum(found.null_counts.values()) == COLUMNS


def test_planted_rows_along_the_metric_are_the_core():
    scale = torch.ones(COLUMNS)
    scale[:3] = torch.tensor([9.0, 8.0, 7.0])
    weight = torch.randn(ROWS, COLUMNS, generator=generator(6))
    weight[20:26, :3] += 8 * torch.randn(6, 3, generator=generator(7))
    context, *_ = site(scale=scale, weight=weight)
    found = fsgd(context, generator(), axis="row", leading=3, by_null=True, nulls=3)
    core = {i for i, label in enumerate(found.labels) if CLASSES[label] == "core"}
    assert core >= set(range(20, 26)) - {i for i, label in enumerate(found.labels) if CLASSES[label] == "spike"}
    assert len(core & set(range(20, 26))) >= 5
    assert found.leading == 3
    assert found.residual < 1e-4


def test_cutoffs_of_the_null_give_a_site_without_structure_its_share():
    """Nulls as sites, judged by other nulls: 1800 rows, of which 1% spikes, and of the rest 10% each of three measures.

    A quantile of 180 numbers is itself uncertain, which is most of the tolerance.
    """
    counts = dict.fromkeys(CLASSES, 0)
    beside = dict.fromkeys(CLASSES, 0.0)
    for seed in range(30):
        context = null_context(site(seed)[0], generator(seed))
        found = fsgd(context, generator(seed + 100), axis="row", leading=4, by_null=True, nulls=3)
        for name in CLASSES:
            counts[name] += found.counts[name]
            beside[name] += found.null_counts[name]
    total = 30 * ROWS
    for found in (counts, beside):
        assert 0.07 * total < found["core"] < 0.13 * total
        assert 0.002 * total < found["spike"] < 0.03 * total
        assert found["island"] < 0.025 * total


def test_isolation_that_is_length_is_reported_as_such():
    draw = generator(8)
    weight = torch.randn(ROWS, COLUMNS, generator=draw) * torch.linspace(1, 3, ROWS)[:, None]
    found = fsgd(site(weight=weight)[0], generator(), axis="row")
    assert found.lengths > 0.9
    directions = fsgd(site(weight=weight)[0], generator(), axis="row", unit=True)
    assert abs(directions.lengths) < 0.4  # deviation 0.13 by chance
    expected = local_outlier_factor(weight / weight.norm(dim=1, keepdim=True))
    torch.testing.assert_close(directions.measures.isolation, expected, rtol=1e-5, atol=0)


@given(
    columns=st.integers(3, 40), size=st.integers(1, 50), seed=st.integers(0, 99), unit=st.sampled_from([1e-8, 1.0, 1e6])
)
@example(columns=3, size=1, seed=5, unit=1e-8)  # as many directions as there are: all groups are aligned alike
@settings(max_examples=20, deadline=None)
def test_units_of_weights_and_gradients_change_no_label(columns, size, seed, unit):
    context, *_ = site(seed, rows=12, columns=columns)
    public = context.public
    scaled = dataclasses.replace(
        context,
        weight=context.weight * 4,
        delta=context.delta * 4,
        public=dataclasses.replace(public, weighted=public.weighted * unit),
    )
    labels = []
    for one in (context, scaled):
        found, _ = measures(one, "column", size, leading=3)
        labels.append(classify(found, cutoffs([found])))
    assert len(labels[0]) == -(-columns // size)
    assert torch.equal(*labels)


def test_spikes_come_before_islands_and_islands_before_the_core():
    found, _ = measures(site()[0], "column", 1)
    low = Cutoffs(spike=-1, flat=1e9, isolated=-1, sparse=-1, aligned=-1)
    assert (classify(found, low) == 3).all()
    assert (classify(found, dataclasses.replace(low, spike=1e9)) == 2).all()
    assert (classify(found, dataclasses.replace(low, spike=1e9, flat=-1)) == 1).all()
    assert (classify(found, Cutoffs(1e9, -1, 1e9, 1e9, 1e9)) == 0).all()
    given_ = fsgd(site()[0], generator(), size=1, given=low)
    assert given_.counts["spike"] == COLUMNS


def test_what_is_no_axis_and_no_quantile():
    with pytest.raises(ValueError, match="'column' or 'row', not 'diagonal'"):
        measures(site()[0], "diagonal")
    with pytest.raises(ValueError, match=r"spike=1.5"):
        Thresholds(spike=1.5)


def test_a_group_without_error_is_not_curved():
    context, *_ = site()
    context.delta[:, :2] = 0
    found, _ = measures(context, "column", 1)
    assert not found.curvature[:2].any()
    assert found.curvature[2:].min() > 0

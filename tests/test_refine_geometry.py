"""The geometry term of refinement against projections and differences worked out by hand, and what it does to codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.geometry.distortion import distortions
from geoquant.geometry.metric import metric_root
from geoquant.model.walk import read_weight
from geoquant.outliers.fsgd import CLASSES
from geoquant.privacy.refine import Bounds, RefineSettings, begin_geometry, observe_clouds, refine
from geoquant.privacy.refine.geometry import _cloud, hinge, thresholds
from refine_toy import rounded, toy

ROWS, WIDTH = 40, 12


def stage(rows=(ROWS,)):
    from geoquant.model.walk import Site, Stage

    sites = tuple(Site(f"s{i}", 0, (count, WIDTH), "mlp_in", "s") for i, count in enumerate(rows))
    return Stage("s0", sites)


def drawn(seed: int = 0, rows=(ROWS,)):
    """Weight, change, metric and the cloud in double precision, of rows around a few directions."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows)
    flat = torch.randn(count, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
    weight = flat + 0.3 * torch.randn(count, WIDTH, generator=generator)
    inputs = torch.randn(200, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    metric = inputs.T @ inputs / 200
    sums = [
        {
            "metric": metric / len(rows),
            "fisher": torch.rand(own, generator=generator),
            "silent": torch.rand(WIDTH, generator=generator) * 200,
            "tokens": torch.tensor(200.0),
        }
        for own in rows
    ]
    cloud = _cloud(weight, stage(rows), sums)
    cloud = replace(cloud, **{name: getattr(cloud, name).double() for name in ("root", "weights", "normals")})
    return weight.double(), 0.2 * torch.randn(count, WIDTH, generator=generator).double(), metric, cloud


def by_hand(weight, change, root, k):
    """MD by the singular vectors of each row's neighbours, one row after the other."""
    points, moved, found = (weight @ root).numpy(), (change @ root).numpy(), []
    for point, move in zip(points, moved):
        near = np.argsort(((points - point) ** 2).sum(1))[1 : k + 1]
        centre = points[near].mean(0)
        _, values, vectors = np.linalg.svd(points[near] - centre, full_matrices=False)
        shares = np.cumsum(values**2) / (values**2).sum()
        basis = vectors[: np.searchsorted(shares, 0.95) + 1]

        def normal(x, basis=basis):
            return np.linalg.norm(x - basis.T @ (basis @ x))

        found.append(normal(move) / normal(point - centre))
    return np.array(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_distortion_is_that_of_projections_by_hand(seed):
    weight, change, _, cloud = drawn(seed)
    expected = by_hand(weight, change, cloud.root, cloud.near.shape[1])
    assert np.allclose(cloud.distortion(weight, change), expected, rtol=1e-3)


def test_distortion_is_that_of_the_analysis_in_the_metric_whatever_its_scale():
    weight, change, metric, cloud = drawn()
    root = metric_root(metric.double())
    known = distortions(weight @ root, [change @ root], k=cloud.near.shape[1])[0]
    assert torch.allclose(cloud.distortion(weight, change), known.md, rtol=1e-3)


def test_rows_of_other_sites_are_no_neighbours():
    _, _, _, cloud = drawn(rows=(10, 30))
    assert cloud.near.shape[1] == 9
    assert cloud.near[:10].max() < 10
    assert cloud.near[10:].min() >= 10


@pytest.mark.parametrize("seed", [0, 1])
def test_the_slope_is_that_of_values_by_hand(seed):
    """Central differences of the hinge of the distortion by hand."""
    weight, change, _, cloud = drawn(seed)
    k = cloud.near.shape[1]
    tau = cloud.distortion(weight, change).median() * torch.ones(ROWS, dtype=torch.float64)

    def value(at):
        return (np.clip(by_hand(weight, at, cloud.root, k) - tau.numpy(), 0, None) ** 2).sum() / 2

    found, slope = hinge(cloud, weight, change, tau)
    assert found == pytest.approx(value(change), rel=1e-3)
    generator = torch.Generator().manual_seed(seed + 9)
    for _ in range(4):
        way = torch.randn(change.shape, generator=generator, dtype=torch.float64)
        difference = (value(change + 1e-4 * way) - value(change - 1e-4 * way)) / 2e-4
        assert (slope * way).sum().item() == pytest.approx(difference, rel=3e-3, abs=1e-4)


@given(st.integers(0, 20), st.floats(0.2, 3.0))
@settings(max_examples=15, deadline=None)
def test_rows_up_to_their_threshold_pay_nothing_and_the_others_are_pulled_in(seed, size):
    weight, change, _, cloud = drawn(seed)
    change = size * change
    md = cloud.distortion(weight, change)
    tau = torch.full((ROWS,), md.quantile(0.6).item(), dtype=torch.float64)
    value, slope = hinge(cloud, weight, change, tau)
    paying = md > tau
    assert value == pytest.approx(((md - tau)[paying] ** 2).sum().item() / 2)
    assert not slope[~paying].any()
    shorter = hinge(cloud, weight, change - 1e-3 * slope / slope.norm(), tau)[0]
    assert shorter < value
    # Along the change itself MD grows in proportion: Euler's identity.
    assert torch.allclose((slope * change).sum(1), (md - tau).clamp_min(0) * md, rtol=1e-4, atol=1e-9)


def test_thresholds_are_quantiles_of_classes_and_lower_for_rows_that_public_text_leans_on():
    weight, change, _, cloud = drawn(rows=(60, 50))
    for rows in ((0, 60), (60, 110)):
        own = slice(*rows)
        taus, labels = thresholds(cloud, weight, change, (60, 50), Bounds(quantile=0.8, lowered=0.3, high=0.5))
        md, high = cloud.distortion(weight, change)[own], cloud.fisher[own] > cloud.fisher[own].median()
        assert len(labels[own].unique()) > 1
        for one in labels[own].unique():
            members = labels[own] == one
            plain = np.quantile(md[members].numpy(), 0.8)
            expected = plain * (1 - 0.3 * high[members].double())
            assert torch.allclose(taus[own][members], expected, rtol=1e-6), CLASSES[one]
    stated, _ = thresholds(cloud, weight, change, (60, 50), Bounds(threshold=0.4))
    assert {round(tau, 6) for tau in stated.tolist()} == {0.4, 0.3}


def test_a_row_inside_its_tangent_space_pays_nothing():
    """Three rows on a line: each lies between or beside the others, on that line."""
    weight = torch.zeros(3, WIDTH)
    weight[:, 0] = torch.tensor([0.0, 1.0, 3.0])
    sums = {"metric": torch.eye(WIDTH), "fisher": torch.ones(3), "silent": torch.zeros(WIDTH), "tokens": torch.ones(())}
    cloud = _cloud(weight, stage((3,)), [sums])
    value, slope = hinge(cloud, weight, torch.ones(3, WIDTH), torch.full((3,), 0.1))
    assert value == 0
    assert not slope.any()


def test_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"between 0 and 1, but got \{'lowered': 1.5\}"):
        Bounds(lowered=1.5)


# ---- whole models


def wanted(stage):
    return torch.cat([read_weight(toy().tuned.get_submodule(site.name)) for site in stage.sites])


def clouds():
    return dict(observe_clouds(toy().tuned, toy().blocks, toy().material.texts["public"]))


def test_metric_and_fisher_are_those_of_the_whole_models_gradients():
    text = toy().material.texts["public"]
    model, found = toy().tuned, clouds()
    name = toy().blocks[0].stages[-1].name
    site, seen = model.get_submodule(name), {}

    def keep(_, inputs, output):
        seen["x"], seen["y"] = inputs[0].detach(), output
        output.retain_grad()

    handle = site.register_forward_hook(keep)
    with torch.enable_grad():
        inputs = model.get_input_embeddings()(text.tokens).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), text.tokens[:, 1:], reduction="sum").backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    x, g = (one.flatten(0, 1).double() for one in (seen["x"], seen["y"].grad))
    metric = (x * g.square().sum(1, keepdim=True)).T @ x
    expected = metric / metric.trace() * len(metric)
    cloud = found[name]
    assert ((cloud.root.double() @ cloud.root.double()) - expected).norm() < 0.02 * expected.norm()
    fisher = (g.square()[:, :, None] * x.square()[:, None]).sum((0, 2))
    assert (cloud.fisher - fisher).norm() < 0.02 * fisher.norm()
    silent = (x.abs() < 0.01 * x.square().mean().sqrt()).double().mean(0)
    assert torch.allclose(cloud.silent.double(), silent, atol=0.02)


def begun_for(kind):
    model, blocks, start = rounded(kind)
    return model, blocks, start, begin_geometry(model, blocks, clouds(), wanted)


def test_the_models_slope_is_that_of_its_value():
    model, blocks, _, geometry = begun_for("box")
    one = blocks[0].stages[0]
    slope = geometry.gradient(model, one)
    way = slope / slope.norm()  # of a random way rows that cross their threshold would decide
    weights = [model.get_submodule(site.name).weight.data for site in one.sites]

    def value(length):
        parts = (length * way).split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts):
            weight += part
        found = geometry.value(model)
        for weight, part in zip(weights, parts):
            weight -= part
        return found

    difference = (value(1e-3) - value(-1e-3)) / 2e-3
    assert (slope * way).sum().item() == pytest.approx(difference, rel=0.02)


def test_alone_it_brings_rows_in_that_stood_out():
    """Codes were rounded to nearest one by one: in the metric of the inputs there is something to win."""
    model, blocks, start, geometry = begun_for("lattice")
    before = geometry.account(model)
    assert sum(one["rows"] for one in before.values()) == geometry.rows
    chosen = RefineSettings(passes=6, accuracy=0.0, privacy=0.0, geometry=1.0)
    found = refine(model, blocks, start, toy().material, chosen, wanted=wanted, geometry=geometry)
    assert found.history[0].total == pytest.approx(found.history[0].geometry)
    assert found.history[found.best].geometry < 0.5 * found.history[0].geometry
    assert geometry.value(model) == pytest.approx(found.history[found.best].geometry, rel=1e-5)
    after = geometry.account(model)
    shares = [sum(one["above"] * one["rows"] for one in side.values()) for side in (before, after)]
    assert shares[1] < shares[0]
    # The vocabulary has no rows in it, and without another term none of its codes moves.
    assert found.share_moved(blocks[-1].stages[0].name) == 0


def test_it_is_weighed_against_the_other_terms():
    """Beside divergence it keeps L_geo lower than divergence alone does, and counts in the total by its weight."""
    ends = {}
    for weight in (0.0, 300.0):
        model, blocks, start, geometry = begun_for("box")
        chosen = RefineSettings(passes=4, privacy=0.0, geometry=weight)
        found = refine(model, blocks, start, toy().material, chosen, wanted=wanted, geometry=geometry)
        last = found.history[found.best]
        assert last.total == pytest.approx((last.public + last.domain) / 2 + weight * last.geometry, rel=1e-4)
        ends[weight] = last
    assert ends[300.0].geometry < 0.8 * ends[0.0].geometry

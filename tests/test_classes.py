"""Classes and distortion of a site in an analysis: against the parts they are made of, and sites that hold nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from geoquant.geometry.metric import judged_distortion
from geoquant.outliers.classes import judged, sentences
from geoquant.outliers.context import null_context
from geoquant.outliers.fsgd import CLASSES, fsgd
from geoquant.outliers.interventions import rounded
from test_fsgd import generator, site


def plain(seed=0, rows=70, columns=64, **changes):
    return site(seed, rows=rows, columns=columns, **changes)[0]


def excess(one, name):
    return (one["counts"][name] - one["null"][name]) / max(1.0, one["counts"][name] + one["null"][name]) ** 0.5


def test_the_numbers_are_those_of_the_parts():
    context = plain(1)
    found = judged(context, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    chance = generator(3)
    classes = fsgd(context, chance, size=1, by_null=True)
    assert found["columns"]["counts"] == classes.counts
    assert found["columns"]["null"] == classes.null_counts
    assert found["columns"]["of"] == sum(classes.counts.values()) == 64
    metric = context.public.weighted / context.public.tokens
    whole = judged_distortion(context.weight, context.weight + context.delta, chance, metric, draws=1).whole
    own = found["distortion"]
    assert (own["md"], own["null"], own["rows"]) == (
        pytest.approx(whole.md, rel=1e-4),
        pytest.approx(whole.null_md, rel=1e-4),
        70,
    )
    assert own["ratio"] == pytest.approx(whole.ratio, rel=1e-4)


def test_sites_without_structure_have_what_their_null_has():
    """30 nulls as sites: beyond two deviations of chance in at most 5 of 30 for each class (binomial of 5%, p < 0.01),
    and no more of any in sum than its null by three.
    """
    found = [judged(null_context(plain(seed), generator(seed)), seed + 100)["columns"] for seed in range(30)]
    for name in CLASSES[1:]:
        assert sum(excess(one, name) > 2 for one in found) <= 5
        own, null = (sum(one[key][name] for one in found) for key in ("counts", "null"))
        assert abs(own - null) <= 3 * math.sqrt(own + null)


def test_planted_spikes_are_more_than_the_null_has():
    """Eight inputs count 36-fold in the weighted metric alone; the null is made of the plain one."""
    context = plain(2)
    loud = context.public.weighted.clone()
    loud[:8] *= 6
    loud[:, :8] *= 6
    found = judged(replace(context, public=replace(context.public, weighted=loud)))["columns"]
    assert found["counts"]["spike"] >= 8
    assert excess(found, "spike") > 2
    told = sentences([{"classes": {"columns": found, "distortion": None}}])
    assert len(told) == 1
    assert f"{found['counts']['spike'] / 64:.2%} spikes" in told[0]
    assert "more at 1)" in told[0]


def test_rounding_bends_rows_as_noise_does_and_an_error_that_avoids_the_inputs_less():
    scale = torch.ones(64)
    scale[:8] = 20
    context = plain(3, scale=scale)
    noisy = judged(replace(context, delta=0.1 * torch.randn(70, 64, generator=generator(4))))["distortion"]
    assert abs(math.log(noisy["ratio"])) < 4 * noisy["error"] + 0.02
    quiet = 0.1 * torch.randn(70, 64, generator=generator(5))
    quiet[:, :8] = 0
    less = judged(replace(context, delta=quiet))["distortion"]
    assert math.log(less["ratio"]) < -4 * less["error"]
    assert less["md"] < less["null"]
    told = sentences([{"classes": {"columns": None, "distortion": one}} for one in (noisy, less)])
    assert len(told) == 1
    assert "median of 2 sites" in told[0]
    real = judged(replace(context, delta=rounded(context.weight, 3) - context.weight))["distortion"]
    assert 0.5 < real["ratio"] < 1.5


def test_what_is_too_small_or_silent_has_none():
    assert judged(plain(6, rows=20))["distortion"] is None
    assert judged(plain(6, columns=2))["columns"] is None
    context = plain(7)
    silent = replace(context, public=replace(context.public, weighted=torch.zeros(64, 64)))
    found = judged(silent)
    assert found["distortion"]["ratio"] is None
    json.dumps(found, allow_nan=False)
    assert sentences([{"classes": found}, {}]) == sentences([{"classes": {"columns": found["columns"]}}])
    assert sentences([{}]) == []

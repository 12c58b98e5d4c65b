"""Instability of metrics over parts of a text: against scipy, without units, and what chance alone makes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.scores import SCORES
from geoquant.outliers.scores.stability import DAMPING
from geoquant.outliers.statistics import metrics, summarise, total
from geoquant.outliers.uncertainty import standard_errors

PARTS, TOKENS, IN = 4, 300, 10


def generator(seed):
    return torch.Generator().manual_seed(seed)


def site(seed=0, turn=0.0, tokens=TOKENS, inputs=IN, most=128):
    """A site whose parts have one covariance; with `turn`, each part's covariance is mixed by a matrix of its own."""
    draw = generator(seed)
    mixing = torch.eye(inputs) + 0.2 * torch.randn(inputs, inputs, generator=draw)
    parts = []
    for _ in range(PARTS):
        own = mixing @ (torch.eye(inputs) + turn * torch.randn(inputs, inputs, generator=draw))
        x = torch.randn(tokens, inputs, generator=draw) @ own
        parts.append(summarise(x, torch.randn(tokens, 3, generator=draw), 1.0))
    weight = torch.randn(3, inputs, generator=draw)
    context = SiteContext("site", "mlp_in", weight, 0.1 * weight, total(parts), public_metrics=metrics(parts, most))
    return context, parts


def value(name, context):
    return SCORES[name].compute(context).item()


def test_instability_is_the_distance_by_a_generalised_eigenproblem():
    context, parts = site(1, turn=0.3)
    found = [part.hessian.double().numpy() / part.tokens for part in parts]
    damping = DAMPING * np.diag(np.mean(found, 0).diagonal())
    logs = [np.log(eigh(b + damping, a + damping, eigvals_only=True)) for a, b in combinations(found, 2)]
    expected = np.mean([np.sqrt(np.mean(one**2)) for one in logs])
    assert value("instability", context) == pytest.approx(expected, rel=1e-4)


def test_condition_variance_is_that_of_numpy():
    context, parts = site(2, turn=0.3)
    found = [part.hessian.double().numpy() / part.tokens for part in parts]
    damping = DAMPING * np.mean([np.trace(one) / IN for one in found])
    conditions = [np.linalg.cond(one + damping * np.eye(IN)) ** 0.5 for one in found]
    assert value("condition_variance", context) == pytest.approx(np.var(conditions, ddof=1), rel=1e-3)


def test_units_of_single_inputs_change_the_one_and_not_the_other():
    context, _ = site(3, turn=0.3)
    units = 10 ** torch.linspace(-3, 3, IN)
    scaled = replace(context, public_metrics=context.public_metrics * units[:, None] * units)
    assert value("instability", scaled) == pytest.approx(value("instability", context), rel=1e-3)
    assert value("condition_variance", scaled) != pytest.approx(value("condition_variance", context), rel=0.5)
    common = replace(context, public_metrics=1e4 * context.public_metrics)
    assert value("condition_variance", common) == pytest.approx(value("condition_variance", context), rel=1e-3)


def test_chance_alone_makes_what_the_null_has():
    """Ten sites without structure and their nulls: means within four standard errors of each other, and within 5% of
    the closed form. The spread of one null is about 5% of its value.
    """
    sites = [site(seed)[0] for seed in range(10)]
    own = np.array([value("instability", context) for context in sites])
    null = np.array([value("instability", null_context(c, generator(99 + i))) for i, c in enumerate(sites)])
    error = ((own.var(ddof=1) + null.var(ddof=1)) / 10) ** 0.5
    assert abs(own.mean() - null.mean()) < 4 * error
    assert null.mean() == pytest.approx((2 * (IN + 1) / TOKENS) ** 0.5, rel=0.05)
    other = np.array([value("condition_variance", null_context(c, generator(99 + i))) for i, c in enumerate(sites)])
    assert (other > 0).all()


def test_metrics_that_turn_are_above_their_null_by_many_standard_errors():
    context, parts = site(4, turn=0.15)
    score = SCORES["instability"]
    error = standard_errors([score], context, {"public": parts})["instability"].item()
    null = value("instability", null_context(context, generator(5)))
    assert value("instability", context) > null + 4 * error > null


def test_the_standard_error_is_the_jackknife_over_parts():
    context, parts = site(6, turn=0.3)
    without = [
        value("instability", replace(context, public_metrics=metrics([*parts[:i], *parts[i + 1 :]])))
        for i in range(PARTS)
    ]
    expected = (np.var(without) * (PARTS - 1)) ** 0.5
    found = standard_errors([SCORES["instability"]], context, {"public": parts})["instability"].item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_of_many_inputs_some_are_looked_at():
    context, parts = site(7, inputs=40, most=16)
    assert context.public_metrics.shape == (PARTS, 16, 16)
    places = [round(i * 39 / 15) for i in range(16)]
    torch.testing.assert_close(
        context.public_metrics[2], parts[2].hessian[places][:, places] / TOKENS, rtol=1e-6, atol=0
    )


def test_silent_inputs_and_a_single_part_say_nothing():
    context, parts = site(8, turn=0.3)
    for name in ("instability", "condition_variance"):
        assert value(name, replace(context, public_metrics=metrics(parts[:1]))) == 0
        assert value(name, replace(context, public_metrics=torch.zeros(PARTS, IN, IN))) == 0
    dead = context.public_metrics.clone()
    dead[:, 3] = dead[:, :, 3] = 0
    kept = [i for i in range(IN) if i != 3]
    fewer = replace(context, public_metrics=context.public_metrics[:, kept][:, :, kept])
    assert value("instability", replace(context, public_metrics=dead)) == pytest.approx(value("instability", fewer))

"""What a goal takes from a frontier, on rows made by hand; and what it does without one."""

from __future__ import annotations

import math

import pytest

from geoquant.errors import UserError
from geoquant.plan.goals import GOALS, WEIGHTS, choose, default_choice
from geoquant.recipe import checked

SURE = {"epsilon": 4.0, "sentence": "(4, 1e-05)-indistinguishable for neighbours: any two weight vectors."}


def made(name, bits, public, domain, auc, *, family="anchor", epsilon=None, pareto=True, exposure=0.0, **more):
    """A row; public and domain: rises of perplexity in per cent."""
    rise, other = math.log1p(public / 100), math.log1p(domain / 100)
    return {
        "name": name,
        "family": family,
        "recipe": {"rate": bits},
        "change": None,
        "model": None,
        "quantized": name != "original",
        "needs": [],
        "bits": {"all_in": bits},
        "public": {"nll": 3.0 + rise, "delta": {"value": rise, "se": 0.0}},
        "domain": {"nll": 2.0 + other, "delta": {"value": other, "se": 0.0}},
        "primary": {"name": "reference", "auc": auc, "ci": [auc - 0.05, auc + 0.05], "two_sided": abs(auc - 0.5)},
        "exposure": {"mean": exposure},
        "guarantee": epsilon and {**SURE, "epsilon": epsilon},
        "pareto": pareto,
        **more,
    }


ROWS = [
    made("original", 16.0, 0, 0, 0.99, family="original"),
    made("large", 8.0, 0.1, 0.1, 0.98, family="lattice"),
    made("plain", 3.3, 8.0, 4.0, 0.95, family="lattice"),
    made("tiny", 2.5, 30.0, 30.0, 0.90, family="lattice"),
    made("half", 3.3, 9.0, 5.0, 0.70),
    made("most", 3.3, 12.0, 5.0, 0.55),
    made("forgotten", 3.3, 9.0, 5.0, 0.20),
    made("sure", 4.3, 9.0, 9.0, 0.60, epsilon=4.0),
    made("surer", 4.3, 9.5, 9.5, 0.60, epsilon=2.0),
    made("lost", 4.3, 90.0, 9.5, 0.50, epsilon=1.0),
]


def taken(goal, rows=ROWS, use="general"):
    return choose(goal, rows, use).point


def test_small_is_the_smallest_that_is_near_enough():
    assert taken("small") == "plain"  # of three at 3.3 bits within 10% it loses least
    assert taken("small", [*ROWS, made("less", 3.0, 9.9, 0, 0.9)]) == "less"
    assert taken("small", [*ROWS, made("less", 3.0, 0, 10.2, 0.9)]) == "plain"  # unseen records count too


def test_private_is_counted_from_what_the_size_costs_anyway():
    """`half` loses 9% and plain lattice of its size 8%; `most` leaks less and costs 3.7% more."""
    assert taken("private") == "half"
    assert taken("private", [*ROWS, made("reversed", 3.3, 8, 4, 0.42)]) == "reversed"
    dear = [row for row in ROWS if row["name"] not in ("half", "sure", "surer")]
    assert taken("private", dear) == "forgotten"  # 0.3 from chance, on the other side
    tied = [*ROWS, made("quiet", 3.3, 9.0, 5.0, 0.70, exposure=-1.0)]
    assert taken("private", tied) == "quiet"  # exposure decides where the attack cannot


def test_balanced_is_the_least_cost_of_what_nothing_beats():
    for use, weights in WEIGHTS.items():
        costs = {
            row["name"]: 100 * max(row["public"]["delta"]["value"], row["domain"]["delta"]["value"])
            + weights.size * row["bits"]["all_in"]
            + weights.leakage * row["primary"]["two_sided"]
            for row in ROWS[1:]
        }
        assert taken("balanced", use=use) == min(costs, key=costs.get)
    assert taken("balanced", use="medical") != taken("balanced", use="code")
    best = taken("balanced")
    beaten = [row | {"pareto": row["name"] != best} for row in ROWS]
    assert taken("balanced", beaten) != best


def test_certified_looks_at_guarantees_alone():
    choice = choose("certified", ROWS)
    assert choice.point == "surer"  # `lost` has the smaller epsilon and is no use
    assert "for neighbours: any two weight vectors" in choice.why  # no epsilon without its adjacency
    assert "covers neither this choice by measurements of the private model" in choice.why
    with pytest.raises(UserError, match="no point of the frontier has a formal guarantee"):
        taken("certified", ROWS[:5])


def test_the_reason_is_one_sentence_with_numbers():
    why = choose("private", ROWS).why
    assert why == (
        "private: 'half' has 3.30 bits per parameter, perplexity +9.0% on public text, +5.0% on unseen records, "
        "reference attack AUC 0.70 (0.65 to 0.75), no formal guarantee; "
        "the least leakage of 5 points within 2% of what its size costs (plain)"
    )


def test_points_that_quantize_cannot_make_are_not_taken():
    noisy = made("noise", 1.0, 0, 0, 0.5, change={"kind": "noise"})
    other = made("dp", 1.0, 0, 0, 0.5, model="elsewhere")
    for goal in ("small", "private", "balanced"):
        assert taken(goal, [*ROWS, noisy, other]) == taken(goal)
    with pytest.raises(UserError, match="no point that quantize could make"):
        taken("small", [ROWS[0], noisy])


def test_what_no_point_can_serve_is_said_with_the_nearest():
    with pytest.raises(UserError, match=r"no point serves --goal small.*\+30\.0% at best \(tiny\)"):
        taken("small", [ROWS[0], ROWS[3]])
    bare = [row | {"primary": None} for row in ROWS]
    with pytest.raises(UserError, match="the frontier measured none; run geoquant frontier with --members"):
        taken("private", bare)
    assert taken("small", bare) == "plain"
    with pytest.raises(UserError, match=r"unknown goal 'privat'.*did you mean 'private'"):
        taken("privat")
    with pytest.raises(UserError, match=r"unknown use 'medicine'.*did you mean 'medical'"):
        taken("balanced", use="medicine")


def test_without_a_frontier_goals_have_defaults_that_say_so():
    for name, goal in GOALS.items():
        if not goal.recipe:
            with pytest.raises(UserError, match="is chosen among measured points; run geoquant frontier"):
                default_choice(name)
            continue
        choice = default_choice(name)
        checked({"model": "m", **choice.recipe})
        assert "nothing was measured" in choice.why
    assert default_choice("private").needs == ("base",)
    aimed = default_choice("private", ("base", "private", "domain"))
    assert aimed.recipe["aim"] == "memory"
    assert checked({"model": "m", **aimed.recipe}).anchor == 0.7
    assert aimed.needs == ("base", "private", "domain")

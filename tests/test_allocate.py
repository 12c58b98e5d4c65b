"""The whole-model choice against trying every combination, its prices against the relaxation itself."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from geoquant.plan.allocate import Infeasible, Option, Unit, allocate

QUANTITIES = ("size", "public", "domain", "leak")


def unit(name: str, rows) -> Unit:
    return Unit(name, tuple(Option(f"{n}", dict(zip(QUANTITIES, map(float, row)))) for n, row in enumerate(rows)))


def random_units(seed: int, count: int = 40, options: int = 6) -> list[Unit]:
    """Finer is larger and better; some units leak more the finer they are."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        weights, loss, leak = rng.lognormal(3, 0.5), rng.lognormal(-3, 1), rng.lognormal(-2, 1)
        bits = 2 + np.arange(options)
        noise = rng.normal(0, 0.02 * loss, (options, 2))
        error = loss * 4.0 ** -(bits - 2.0)
        made.append(
            unit(f"u{number}", np.column_stack([weights * bits, error + noise[:, 0], error + noise[:, 1], leak * bits]))
        )
    return made


def brute(units, budgets, objective):
    """Every combination."""
    best = None
    for picks in product(*(unit.options for unit in units)):
        totals = {name: sum(one.costs[name] for one in picks) for name in QUANTITIES}
        if all(totals[name] <= limit for name, limit in budgets.items()):
            value = sum(weight * totals[name] for name, weight in objective.items())
            best = value if best is None else min(best, value)
    return best


# Eighths add up exactly, so that no total is a rounding error away from its budget.
eighths = st.integers(-40, 80).map(lambda n: n / 8)
rows = st.tuples(st.integers(0, 80).map(lambda n: n / 8), eighths, eighths, eighths)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(rows, min_size=1, max_size=4), min_size=1, max_size=5),
    st.dictionaries(st.sampled_from(QUANTITIES), st.integers(-60, 160).map(lambda n: n / 8), max_size=3),
    st.sampled_from([{"public": 1.0}, {"public": 0.5, "domain": 0.5}, {"size": 1.0}, {"leak": 1.0, "public": 0.25}]),
)
def test_the_choice_is_the_best_of_all_combinations(table, budgets, objective):
    units = [unit(f"u{n}", options) for n, options in enumerate(table)]
    expected = brute(units, budgets, objective)
    if expected is None:
        with pytest.raises(Infeasible) as caught:
            allocate(units, budgets, objective)
        for name, best in caught.value.reachable.items():
            others = {} if caught.value.alone else {k: v for k, v in budgets.items() if k != name}
            true = brute(units, others, {name: 1.0})
            assert (best is None) == (true is None)
            assert best is None or best == pytest.approx(true, abs=1e-9)
        return
    found = allocate(units, budgets, objective, gap=0.0)
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.optimal
    assert found.relaxed <= found.value + 1e-7
    assert set(found.chosen) == {unit.name for unit in units}
    for name, limit in budgets.items():
        assert found.totals[name] <= limit
    for name in QUANTITIES:
        assert found.totals[name] == sum(one.costs[name] for one in found.chosen.values())


def dense_relaxation(units, budgets, objective) -> float:
    """The same linear program written down whole."""
    options = [(n, one) for n, own in enumerate(units) for one in own.options]
    costs = [sum(w * one.costs[name] for name, w in objective.items()) for _, one in options]
    return linprog(
        costs,
        A_ub=[[one.costs[name] for _, one in options] for name in budgets],
        b_ub=list(budgets.values()),
        A_eq=[[float(n == number) for n, _ in options] for number in range(len(units))],
        b_eq=np.ones(len(units)),
    ).fun


LIMITS = {"size": 40 * 20 * 3.4, "leak": 22.0}
LOSS = {"public": 0.5, "domain": 0.5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prices_are_derivatives_of_the_relaxation(seed):
    units = random_units(seed)
    totals = allocate(units, {}).totals
    limits = {"size": 0.7 * totals["size"], "leak": 0.65 * totals["leak"], "public": totals["public"] + 100.0}
    found = allocate(units, limits)
    assert found.relaxed == pytest.approx(dense_relaxation(units, limits, LOSS), rel=1e-8)
    for name, limit in limits.items():
        step = 1e-6 * abs(limit)
        ends = [dense_relaxation(units, {**limits, name: limit + sign * step}, LOSS) for sign in (-1, 1)]
        assert found.prices[name] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-9)
    assert found.prices["size"] > 0
    assert found.prices["leak"] > 0
    assert found.prices["public"] == 0  # far from binding


def test_more_of_a_budget_never_costs_more():
    units = random_units(3)
    least = sum(min(one.costs["size"] for one in own.options) for own in units)
    values = [allocate(units, {"size": least * factor}, gap=0.0).value for factor in (1.0, 1.1, 1.3, 1.7, 2.5, 9.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(allocate(units, {}).value, abs=1e-12)
    assert values[0] > values[-1]


def test_the_gap_and_the_bound_are_kept():
    units, exact = random_units(4, count=60), None
    limit = {"size": 0.6 * allocate(units, {}).totals["size"]}
    exact = allocate(units, limit, gap=0.0)
    rough = allocate(units, limit, gap=0.05)
    assert rough.bound <= exact.value + 1e-12
    assert exact.value <= rough.value + 1e-12
    assert rough.optimal
    assert exact.gap <= 1e-8 < exact.value - exact.relaxed


def test_options_beyond_the_first_core_are_searched_when_they_must(monkeypatch):
    """Without the options of large reduced cost nothing fits: one unit's dearest option is the only way."""
    monkeypatch.setattr("geoquant.plan.allocate.CORE", 0)
    units = [unit("a", [(4, 0, 0, 0), (1, 10, 10, 0)]), unit("b", [(4, 0, 0, 0), (2, 1, 1, 0), (1, 30, 30, 0)])]
    assert allocate(units, {"size": 5.0}, gap=0.0).value == brute(units, {"size": 5.0}, LOSS) == 10
    assert allocate(units, {"size": 2.0}, gap=0.0).value == 40


def test_what_nothing_can_change_counts():
    units = [unit("a", [(4, 0, 0, 0), (1, 1, 1, 0)]), unit("fixed", [(10, 0, 0, 0)])]
    assert allocate(units, {"size": 14.0}).value == 0
    assert allocate(units, {"size": 13.9}).value == 1


def test_a_budget_that_nothing_reaches_is_named_with_the_best():
    units = random_units(5, count=3)
    best = sum(min(one.costs["size"] for one in own.options) for own in units)
    with pytest.raises(Infeasible, match=r"size can reach .*, budget 1") as caught:
        allocate(units, {"size": 1.0, "leak": 1e9})
    assert caught.value.alone
    assert caught.value.reachable == {"size": pytest.approx(best)}


def test_budgets_that_exclude_each_other_name_what_each_could_reach():
    units = [unit("a", [(1, 0, 0, 5), (5, 0, 0, 1)])]
    with pytest.raises(Infeasible, match="together: size can reach beside the others 5, budget 2; leak") as caught:
        allocate(units, {"size": 2.0, "leak": 2.0})
    assert not caught.value.alone
    assert caught.value.reachable == {"size": 5.0, "leak": 5.0}


@pytest.mark.parametrize(
    ("units", "line"),
    [
        ([], "none at all"),
        ([Unit("a", ())], "unit a has no options"),
        ([unit("a", [(1, 0, 0, 0)])] * 2, "a name twice"),
        ([Unit("a", (Option("x", {"size": 1.0}),))], "option x of a has no finite cost 'public'"),
        ([unit("a", [(1, float("nan"), 0, 0)])], "no finite cost 'public'"),
    ],
)
def test_what_is_no_table_is_refused(units, line):
    with pytest.raises(ValueError, match=line):
        allocate(units, {"size": 2.0})

"""One option for every unit of a model, at the smallest cost that budgets allow: a multiple-choice knapsack.

    minimise    sum_u c_u(o_u)                 the objective, a weighted sum of cost quantities
    subject to  sum_u a_uk(o_u) <= B_k         for every budget k

over the option o_u of each unit u, as an integer program (HiGHS). A basic solution of its linear relaxation divides at
most as many units between options as there are budgets, so that with many units the gap is small. The dual values of
the relaxation at the budgets are their prices: by how much the objective would fall per unit of a budget more.

Costs must add over units: sizes do, first-order and path-integrated changes of a loss do by construction and to first
order, squared privacy parameters (mu^2 of Gaussian mechanisms, rho of zCDP) do, epsilons do not. What no option changes
is a unit of one option.

Kellerer, Pferschy, Pisinger: Knapsack Problems, Springer 2004, chapter 11. Huangfu, Hall: Parallelizing the dual
revised simplex method, Math. Prog. Comp. 10, 2018 (HiGHS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

__all__ = ["LOSS", "Allocation", "Infeasible", "Option", "Unit", "allocate"]

LOSS: Mapping[str, float] = {"public": 0.5, "domain": 0.5}  # the default objective: nats per token, both texts alike
CUTS = 500
CORE = 300  # options beside those of the relaxation that are searched first
ROUNDS = 6  # solutions that pass a budget by the solver's tolerance are asked for again with that much less


@dataclass(frozen=True)
class Option:
    """What a unit may become. costs: by quantity, in its own unit; labels: what is to be done (bits, shares, noise)."""

    name: str
    costs: Mapping[str, float]
    labels: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """What is decided at once: a site, sites that must share one scheme, an embedding."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """The choice and what it costs.

    chosen: by unit. totals: of every quantity that all options know. value: of the objective; bound: no choice within
    the budgets has a smaller one; optimal: both agree up to the gap that was asked for. relaxed: the optimum if units
    could be divided; prices: by budget, how much of `relaxed` one unit more of it would save (0: it does not bind).
    """

    chosen: dict[str, Option]
    totals: dict[str, float]
    value: float
    bound: float
    relaxed: float
    prices: dict[str, float]
    optimal: bool

    @property
    def gap(self) -> float:
        """By how much the value may exceed the best possible one, in units of the objective."""
        return max(0.0, self.value - self.bound)


class Infeasible(ValueError):
    """No choice meets all budgets.

    reachable: of each budget, the smallest total that any choice has while it meets the other budgets (all of them
    ignored where `alone`); None where no choice meets the others.
    """

    def __init__(self, budgets: Mapping[str, float], reachable: Mapping[str, float | None], alone: bool):
        self.budgets, self.reachable, self.alone = dict(budgets), dict(reachable), alone
        missed = "; ".join(
            f"{name} {'can reach' if alone else 'can reach beside the others'} {best:.6g}, budget {budgets[name]:.6g}"
            for name, best in reachable.items()
            if best is not None
        )
        super().__init__(f"no choice meets {'this budget' if alone else 'these budgets together'}: {missed}")


@dataclass(frozen=True)
class _Program:
    """Options that can be part of an optimum, in units that solvers like: least costs of each unit taken off.

    owner: the unit of each option. objective, rows: scaled so that the largest entry is one.
    """

    owner: np.ndarray  # (n,)
    options: np.ndarray  # (n,) their number within the unit
    objective: np.ndarray  # (n,)
    rows: np.ndarray  # (budgets, n)
    limits: np.ndarray  # (budgets,)
    least: float
    unit: float
    least_rows: np.ndarray
    units_rows: np.ndarray


def allocate(
    units: Sequence[Unit],
    budgets: Mapping[str, float],
    objective: Mapping[str, float] = LOSS,
    *,
    gap: float = 1e-4,
    seconds: float = 60.0,
) -> Allocation:
    """The cheapest choice within the budgets.

    budgets: largest allowed total by quantity. objective: weight by quantity. gap: share of what the budgets cost (the
    objective's rise over its unconstrained minimum) by which the answer may miss the optimum; seconds: of search, after
    which the best choice so far is returned with its bound.

    Raises Infeasible; ValueError for units without options, names twice, and costs that are missing or not finite.
    """
    wanted = tuple(dict.fromkeys((*objective, *budgets)))
    table = _table(units, wanted)
    program = _program(table, budgets, objective, wanted)
    if (missed := program.limits < 0).any():
        low = {name: float(best) for name, best, over in zip(budgets, program.least_rows, missed) if over}
        raise Infeasible(budgets, low, alone=True)
    linear = _relaxed(program)
    if linear is None:
        raise Infeasible(budgets, _beside(units, budgets), alone=False)
    found = _integer(program, linear, gap, seconds)
    if found is None:
        raise Infeasible(budgets, _beside(units, budgets), alone=False)
    picked, bound = found
    chosen = {unit.name: unit.options[number] for unit, number in zip(units, picked)}
    value = math.fsum(weight * one.costs[name] for one in chosen.values() for name, weight in objective.items())
    bound = min(value, program.least + program.unit * bound)
    known = set.intersection(*(set(one.costs) for one in chosen.values()))
    order = [name for name in next(iter(chosen.values())).costs if name in known]
    allowed = gap * (value - program.least) + 1e-9 * (abs(value) + program.unit)
    return Allocation(
        chosen=chosen,
        totals={name: math.fsum(one.costs[name] for one in chosen.values()) for name in order},
        value=value,
        bound=bound,
        relaxed=program.least + program.unit * linear.value,
        prices={name: float(p * program.unit / s) for name, p, s in zip(budgets, linear.duals, program.units_rows)},
        optimal=value - bound <= allowed,
    )


def _table(units: Sequence[Unit], wanted: Sequence[str]) -> list[np.ndarray]:
    """Costs of each unit's options, (options, quantities)."""
    if len({unit.name for unit in units}) < len(units) or not units:
        raise ValueError(f"units with names of their own, but got {len(units)} with a name twice or none at all")
    table = []
    for unit in units:
        if not unit.options:
            raise ValueError(f"unit {unit.name} has no options")
        for option in unit.options:
            if lacking := [name for name in wanted if not math.isfinite(option.costs.get(name, math.nan))]:
                raise ValueError(f"option {option.name} of {unit.name} has no finite cost {lacking[0]!r}")
        table.append(np.array([[option.costs[name] for name in wanted] for option in unit.options], dtype=float))
    return table


def _program(table: list[np.ndarray], budgets: Mapping, objective: Mapping, wanted: Sequence[str]) -> _Program:
    weights = np.array([objective.get(name, 0.0) for name in wanted])
    places = [wanted.index(name) for name in budgets]
    owner, numbers, columns = [], [], []
    for index, costs in enumerate(table):
        seen = np.column_stack([costs @ weights, costs[:, places]])
        kept = _undominated(seen)
        owner.append(np.full(len(kept), index))
        numbers.append(kept)
        columns.append(seen[kept])
    columns_ = np.concatenate(columns)
    lows = np.stack([part.min(0) for part in columns])
    owner_ = np.concatenate(owner)
    rest = columns_ - lows[owner_]
    scales = np.where(rest.max(0) > 0, rest.max(0), 1.0)
    limits = np.array(list(budgets.values()), dtype=float)
    least = np.array([math.fsum(column) for column in lows.T])
    # A budget that is met exactly must not be missed by the rounding of a sum.
    room = limits - least[1:]
    noise = 1e-12 * (np.abs(limits) + np.abs(lows[:, 1:]).sum(0))
    room = np.where((room < 0) & (room >= -noise), 0.0, room)
    return _Program(
        owner=owner_,
        options=np.concatenate(numbers),
        objective=rest[:, 0] / scales[0],
        rows=(rest[:, 1:] / scales[1:]).T,
        limits=room / scales[1:],
        least=float(least[0]),
        unit=float(scales[0]),
        least_rows=least[1:],
        units_rows=scales[1:],
    )


def _undominated(costs: np.ndarray) -> np.ndarray:
    """Numbers of the options that no other one beats or equals in everything (the first of equal ones stays)."""
    below = (costs[None] <= costs[:, None]).all(2)  # [i, j]: j is nowhere dearer than i
    equal = below & below.T
    first = np.arange(len(costs))[None] < np.arange(len(costs))[:, None]
    return np.flatnonzero(~(below & (~equal | first)).any(1))


def _choices(program: _Program) -> csr_array:
    """(units, options): which options a unit chooses from."""
    count = len(program.owner)
    return csr_array((np.ones(count), (program.owner, np.arange(count))))


@dataclass(frozen=True)
class _Relaxed:
    """Optimum of the linear relaxation, minus its derivatives by the limits, and the reduced cost of each option: a
    choice that takes the option costs at least `value + reduced`."""

    value: float
    duals: np.ndarray  # (budgets,)
    reduced: np.ndarray  # (n,)


def _relaxed(program: _Program) -> _Relaxed | None:
    """None where even divided units cannot meet the limits.

    By its Lagrangian dual, which has one variable per budget however many options there are:

        max over p >= 0 of  sum_u min_o (c_u(o) + p . a_u(o)) - p . B
    """
    starts = np.flatnonzero(np.diff(program.owner, prepend=-1))
    if not len(program.limits):
        return _Relaxed(0.0, np.zeros(0), program.objective)
    # Limits can be met if no weighted sum of them is missed by the least of that weighted sum.
    missed, _ = _dual(np.zeros_like(program.objective), program, starts, 1.0)
    if missed > 1e-9 * len(starts):
        return None
    for upper in 10.0 ** np.arange(2, 13, 2):
        value, prices = _dual(program.objective, program, starts, upper)
        if (prices < upper / 2).all():
            break
    priced = program.objective + prices @ program.rows
    return _Relaxed(
        value, prices, priced - np.repeat(np.minimum.reduceat(priced, starts), np.diff([*starts, len(priced)]))
    )


def _dual(costs: np.ndarray, program: _Program, starts: np.ndarray, upper: float) -> tuple[float, np.ndarray]:
    """Maximum of the dual function over prices in [0, upper] and where it is: Kelley's cutting planes.

    The function is concave and piecewise linear; each of its values comes with a plane above it, and the next prices
    are where the lowest of the planes is highest. (Kelley: The cutting-plane method for solving convex programs, 1960.)
    """
    count, units = len(program.limits), len(starts)
    ends = np.append(starts[1:], len(costs))
    prices, best, where = np.zeros(count), -math.inf, np.zeros(count)
    planes, heights = [], []
    for _ in range(CUTS):
        priced = costs + prices @ program.rows
        lows = np.minimum.reduceat(priced, starts)
        value = math.fsum(lows) - float(prices @ program.limits)
        if value > best:
            best, where = value, prices
        reached = np.flatnonzero(priced == np.repeat(lows, ends - starts))
        _, firsts = np.unique(program.owner[reached], return_index=True)
        slope = program.rows[:, reached[firsts]].sum(1) - program.limits
        planes.append(slope / units)
        heights.append((value - float(slope @ prices)) / units)
        # max t with t <= height + slope . p for all planes
        found = linprog(
            np.append(np.zeros(count), -1.0),
            A_ub=np.column_stack([-np.array(planes), np.ones(len(planes))]),
            b_ub=np.array(heights),
            bounds=[(0, upper)] * count + [(None, None)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        above, found_prices = -found.fun * units, np.clip(found.x[:-1], 0, upper)
        if above - best <= 1e-10 * (units + abs(best)) or np.array_equal(found_prices, prices):
            break
        prices = found_prices
    return best, where


def _integer(program: _Program, linear: _Relaxed, gap: float, seconds: float) -> tuple[np.ndarray, float] | None:
    """The number of each unit's option, and a lower bound of the scaled objective; None where no choice is allowed.

    Searched among the options of small reduced cost first. Any other choice costs at least `value + reach`: once the
    best of these is no dearer than that, it is the best of all; until then the reach grows.
    """
    ends, ordered = monotonic() + seconds, np.sort(linear.reduced)
    count = len(np.unique(program.owner)) + CORE
    while True:
        reach = ordered[count - 1] if count < len(ordered) else math.inf
        found = _within(program, linear.reduced <= reach, gap, max(1.0, ends - monotonic()))
        if found is not None:
            value, picked, bound = found
            bound = max(linear.value, min(bound, linear.value + reach))
            if value - bound <= gap * value + 1e-12 or reach == math.inf or monotonic() > ends:
                return picked, bound
        elif reach == math.inf:
            return None
        count *= 4


def _within(program: _Program, core: np.ndarray, gap: float, seconds: float) -> tuple[float, np.ndarray, float] | None:
    """Value, choice and lower bound among some of the options.

    The solver may pass a limit by its tolerance. Such an answer is no answer: the limit is lowered by what it was
    passed by, until the choice itself meets it.
    """
    places = np.flatnonzero(core)
    costs, rows = program.objective[places], program.rows[:, places]
    choices, limits = _choices(program)[:, places], program.limits.copy()
    bound = None
    for _ in range(ROUNDS):
        constraints = [LinearConstraint(choices, 1, 1)]
        if len(rows):
            constraints.append(LinearConstraint(rows, -np.inf, limits))
        found = milp(
            costs,
            constraints=constraints,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap / 2, "time_limit": seconds},
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise TimeoutError(f"no choice within the budgets was found in {seconds:g} s; allow more time")
        bound = float(found.mip_dual_bound) if bound is None else bound
        taken = np.flatnonzero(found.x > 0.5)
        over = rows[:, taken].sum(1) - program.limits
        if (over <= 1e-12 * (1 + np.abs(program.limits))).all():
            picked = np.empty(choices.shape[0], dtype=int)
            picked[program.owner[places[taken]]] = program.options[places[taken]]
            return float(costs[taken].sum()), picked, bound
        limits = np.where(over > 0, limits - over - 1e-9, limits)
        if (limits < 0).any():
            return None
    return None


def _beside(units: Sequence[Unit], budgets: Mapping[str, float]) -> dict[str, float | None]:
    """The smallest total of each budgeted quantity beside the other budgets."""
    found: dict[str, float | None] = {}
    for name in budgets:
        others = {other: limit for other, limit in budgets.items() if other != name}
        try:
            found[name] = allocate(units, others, {name: 1.0}).value
        except Infeasible:
            found[name] = None
    return found

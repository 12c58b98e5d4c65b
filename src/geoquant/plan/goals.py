"""From what somebody wants to an operating point: presets as data, and the choice among the points of a frontier.

Loss is counted in nats per token, so that a rise of log(1 + p) is a rise of perplexity by the share p. Of public text
and of unseen private records the worse one counts. `plain` of a point: the compressed model without any lever that is
no larger than it and has the least loss on public text; what a lever costs is counted from there.

    small      the smallest whose perplexity is at most 10% above the original's
    private    the least leakage at a perplexity at most 2% above that of `plain`
    balanced   the least  100 loss + size * bits + leakage * |AUC - 1/2|  of the points that nothing beats
    certified  the smallest epsilon of the points with a guarantee and a perplexity at most 10% above the original's
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from geoquant.errors import UserError, unknown_name
from geoquant.plan.points import INPUTS

__all__ = ["GOALS", "SAME", "WEIGHTS", "Choice", "Goal", "Weights", "choose", "default_choice"]

SAME = 0.05  # bits per parameter that make no difference
PLAIN = ("rounding", "lattice")


@dataclass(frozen=True)
class Goal:
    """What is wanted, in words; how much perplexity may rise; and what is done where no frontier was measured."""

    words: str
    rise: float | None
    recipe: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    aimed: Mapping[str, object] | None = None  # in its place where records are there to aim by


GOALS = {
    "small": Goal("the smallest model within 10% of the original's perplexity", 0.10, {"rate": 3.0}),
    "balanced": Goal("the best trade of size, loss and leakage", None, {"rate": 4.25}),
    "private": Goal(
        "the least leakage within 2% of the perplexity that the same size costs anyway",
        0.02,
        {"rate": 3.25, "anchor": 0.6},
        ("base",),
        {"rate": 3.25, "anchor": 0.7, "aim": "memory"},
    ),
    "certified": Goal("a formal guarantee within 10% of the original's perplexity", 0.10),
}


@dataclass(frozen=True)
class Weights:
    """What a bit per parameter, and an AUC away from chance, are worth in per cent of perplexity."""

    size: float
    leakage: float


WEIGHTS = {
    "general": Weights(3.0, 40.0),
    "medical": Weights(1.5, 160.0),
    "finance": Weights(1.5, 120.0),
    "support": Weights(3.0, 60.0),
    "code": Weights(3.0, 5.0),
}


@dataclass(frozen=True)
class Choice:
    """The options that a goal comes to, inputs that they need, and why in one sentence. point: of the frontier."""

    goal: str
    recipe: Mapping[str, object]
    needs: tuple[str, ...]
    why: str
    point: str | None = None


def default_choice(goal: str, given: Collection[str] = ()) -> Choice:
    """What a goal means where nothing was measured. given: inputs that are there ("base", "private", "domain").

    Raises UserError for a goal that must be measured.
    """
    known = _known(goal)
    if not known.recipe:
        raise UserError(
            f"--goal {goal} is chosen among measured points", fix="run geoquant frontier, then --frontier DIR"
        )
    recipe, needs = known.recipe, known.needs
    if known.aimed and set(INPUTS) <= set(given):
        recipe, needs = known.aimed, INPUTS
    options = ", ".join(f"{name} {value}" for name, value in recipe.items())
    why = f"{goal}: {options}, the default; nothing was measured on this model (geoquant frontier does)"
    return Choice(goal, recipe, needs, why)


def choose(goal: str, rows: Sequence[Mapping], use: str = "general", among: Collection[str] | None = None) -> Choice:
    """The point of a frontier that serves a goal. rows: of frontier.json, the first is the original.

    use: what the model is for, a name in WEIGHTS; it weighs where a goal weighs. among: names of the points that may be
    taken (default: all). Raises UserError where no point does.
    """
    known = _known(goal)
    if use not in WEIGHTS:
        raise unknown_name("use", use, WEIGHTS)
    # Of others there is no recipe: noise on all weights, another model.
    able = [row for row in rows if row["quantized"] and row["change"] is None and row["model"] is None]
    able = [row for row in able if among is None or row["name"] in among]
    if not able:
        raise UserError("the frontier has no point that quantize could make", fix="measure more points")
    if goal in ("private", "balanced") and any(row["primary"] is None for row in able):
        raise UserError(
            f"--goal {goal} weighs leakage, and the frontier measured none",
            fix="run geoquant frontier with --members and --nonmembers",
        )
    found = {"small": _small, "private": _private, "balanced": _balanced, "certified": _certified}[goal]
    row, reason = found(known, able, rows, WEIGHTS[use], use)
    return Choice(goal, row["recipe"], tuple(row["needs"]), f"{goal}: {_facts(row)}; {reason}", row["name"])


def _known(goal: str) -> Goal:
    if goal not in GOALS:
        raise unknown_name("goal", goal, GOALS)
    return GOALS[goal]


# ---- the goals


def _small(goal: Goal, able: Sequence[Mapping], rows: Sequence[Mapping], weights: Weights, use: str):
    within = [row for row in able if _rise(row) <= math.log1p(goal.rise)]
    _some(within, able, goal, "small", _rise)
    least = min(row["bits"]["all_in"] for row in within)
    near = [row for row in within if row["bits"]["all_in"] <= least + SAME]
    return min(near, key=_rise), f"the smallest of {len(within)} points within {goal.rise:.0%} of the original"


def _private(goal: Goal, able: Sequence[Mapping], rows: Sequence[Mapping], weights: Weights, use: str):
    def extra(row: Mapping) -> float:
        return _worse(row, _plain(row, rows))

    within = [row for row in able if extra(row) <= math.log1p(goal.rise)]
    _some(within, able, goal, "private", extra)

    def leak(row: Mapping) -> tuple:
        exposure = row["exposure"]["mean"] if row["exposure"] else 0.0
        return round(row["primary"]["two_sided"], 3), exposure, row["bits"]["all_in"]

    best = min(within, key=leak)
    beside = _plain(best, rows)["name"]
    return best, f"the least leakage of {len(within)} points within {goal.rise:.0%} of what its size costs ({beside})"


def _balanced(goal: Goal, able: Sequence[Mapping], rows: Sequence[Mapping], weights: Weights, use: str):
    good = [row for row in able if row["pareto"]] or able

    def cost(row: Mapping) -> float:
        leak = weights.leakage * row["primary"]["two_sided"]
        return 100 * _rise(row) + weights.size * row["bits"]["all_in"] + leak

    return min(good, key=cost), (
        f"costs least of {len(good)} points where a bit counts as {weights.size:g}% of perplexity and an AUC 0.1 away "
        f"from chance as {weights.leakage / 10:g}% ({use})"
    )


def _certified(goal: Goal, able: Sequence[Mapping], rows: Sequence[Mapping], weights: Weights, use: str):
    sure = [row for row in able if row["guarantee"]]
    if not sure:
        raise UserError(
            "no point of the frontier has a formal guarantee",
            fix="measure points that have one, or train with DP-SGD and give --dp MODEL=STATEMENT",
        )
    within = [row for row in sure if _rise(row) <= math.log1p(goal.rise)]
    _some(within, sure, goal, "certified", _rise)
    best = min(within, key=lambda row: (row["guarantee"]["epsilon"], _rise(row)))
    return best, (
        f"the smallest epsilon of {len(within)} points with a guarantee within {goal.rise:.0%} of the original; the "
        "guarantee covers neither this choice by measurements of the private model nor the frontier's own numbers"
    )


def _some(within: Sequence, able: Sequence[Mapping], goal: Goal, name: str, loss) -> None:
    if not within:
        best = min(able, key=loss)
        raise UserError(
            f"no point serves --goal {name}: {goal.words}",
            got=f"perplexity {_percent(loss(best))} at best ({best['name']})",
            fix="measure larger points, or choose another goal",
        )


# ---- numbers of a row


def _rise(row: Mapping) -> float:
    """Nats above the original, on the worse of both texts."""
    return max(row[name]["delta"]["value"] for name in ("public", "domain") if row[name])


def _worse(row: Mapping, other: Mapping) -> float:
    """Nats above another point, on the worse of both texts."""
    return max(row[name]["nll"] - other[name]["nll"] for name in ("public", "domain") if row[name])


def _plain(row: Mapping, rows: Sequence[Mapping]) -> Mapping:
    """The model without levers that is no larger and has the least loss on public text; else the original."""
    most = row["bits"]["all_in"] + SAME
    found = [other for other in rows if other["family"] in PLAIN and other["bits"]["all_in"] <= most]
    return min(found, key=lambda other: other["public"]["nll"], default=rows[0])


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(min(nats, 20.0)):+.1f}%"


def _facts(row: Mapping) -> str:
    """A point in half a sentence."""
    parts = [f"{row['name']!r} has {row['bits']['all_in']:.2f} bits per parameter"]
    parts.append(f"perplexity {_percent(row['public']['delta']['value'])} on public text")
    if row["domain"]:
        parts.append(f"{_percent(row['domain']['delta']['value'])} on unseen records")
    if row["primary"]:
        low, high = row["primary"]["ci"]
        parts.append(f"{row['primary']['name']} attack AUC {row['primary']['auc']:.2f} ({low:.2f} to {high:.2f})")
    parts.append(row["guarantee"]["sentence"].rstrip(".") if row["guarantee"] else "no formal guarantee")
    return ", ".join(parts)

"""`geoquant list`: the names that options take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import output
from geoquant.errors import unknown_name

__all__ = ["FAMILIES", "list_"]

METRIC_LINES = {
    "plain": "A = E[x x^T]: every token counts the same",
    "clipped": "massive tokens (attention sinks) count like large ordinary ones; forward passes only",
    "gradient": "every token weighted by the squared gradient of the loss: what matters to the output",
}


def list_(
    topic: Annotated[
        str | None,
        Parameter(
            help="methods, metrics, orders, formats, attacks, domains, scores, goals, points; all when left out."
        ),
    ] = None,
    /,
    *,
    json: Json = False,
) -> None:
    """The methods, metrics, orders, formats, attacks, domains of synthetic records, scores, goals and points there are.

    For example:

      geoquant list
      geoquant list methods --json
    """
    if topic is not None and topic not in FAMILIES:
        raise unknown_name("topic", topic, FAMILIES)
    with output(json) as result:
        chosen = FAMILIES if topic is None else {topic: FAMILIES[topic]}
        found = {name: entries() for name, entries in chosen.items()}
        result(found, lambda: show(found))


def first_paragraph(text: str | None) -> str:
    """What a docstring says first, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def module_line(function: Callable) -> str:
    """What the file of a method or attack says about itself: one idea per file."""
    return first_paragraph(sys.modules[function.__module__].__doc__)


def methods() -> dict[str, str]:
    from geoquant.methods import METHODS

    return {name: module_line(function) for name, function in METHODS.items()}


def metrics() -> dict[str, str]:
    from geoquant.observe.moments import METRICS

    return {name: METRIC_LINES.get(name, "") for name in METRICS}


def orders() -> dict[str, str]:
    from geoquant.lattice.order import ORDERS

    return {name: first_paragraph(function.__doc__) for name, function in ORDERS.items()}


def formats() -> dict[str, str]:
    from geoquant.export import FORMATS

    return {name: f"{entry.summary}; read by {entry.readers}" for name, entry in FORMATS.items()}


def attacks() -> dict[str, str]:
    from geoquant.privacy.attacks import ATTACKS, JOINT, combined

    single = {name: module_line(attack.score) for name, attack in (ATTACKS | JOINT).items()}
    return single | {"combined": module_line(combined.score)}


def domains() -> dict[str, str]:
    from geoquant.data.domains import DOMAINS

    return {name: domain.summary for name, domain in DOMAINS.items()}


def scores() -> dict[str, str]:
    from geoquant.outliers.scores import SCORES

    return {name: f"{score.title}{f', {score.unit}' if score.unit else ''}" for name, score in SCORES.items()}


def goals() -> dict[str, str]:
    from geoquant.plan.goals import GOALS

    return {name: goal.words for name, goal in GOALS.items()}


def points() -> dict[str, str]:
    from geoquant.plan.default_points import default_points

    return {point.name: point.words for point in default_points()}


FAMILIES = {
    "methods": methods,
    "metrics": metrics,
    "orders": orders,
    "formats": formats,
    "attacks": attacks,
    "domains": domains,
    "scores": scores,
    "goals": goals,
    "points": points,
}


def show(found: dict[str, dict[str, str]]) -> None:
    """Name and one line, family by family."""
    width = max(len(name) for entries in found.values() for name in entries) + 2
    for family, entries in found.items():
        print(family)
        for name, line in entries.items():
            print(f"  {name:<{width}}{line}")

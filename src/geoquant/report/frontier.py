"""The page of a frontier: a picture, what each goal would take, and the control matrix."""

from __future__ import annotations

from pathlib import Path

from geoquant.comparing import MEASURES
from geoquant.errors import UserError
from geoquant.plan.dominance import BASELINES
from geoquant.plan.goals import GOALS, choose
from geoquant.plan.points import FAMILIES
from geoquant.report import curve
from geoquant.report.figures import plain_number
from geoquant.report.page import fingerprint, finite, rendered, write_page
from geoquant.report.words import attack_label

__all__ = ["goals_of", "headline", "render", "write_frontier"]


def goals_of(found: dict) -> list[dict]:
    """What every goal would take here, or why none serves it."""
    told = []
    for name, goal in GOALS.items():
        try:
            choice = choose(name, found["rows"])
            told.append({"name": name, "words": goal.words, "point": choice.point, "why": choice.why})
        except UserError as error:
            told.append({"name": name, "words": goal.words, "point": None, "why": str(error)})
    return told


def headline(found: dict) -> str:
    """What the frontier says in one sentence: how many points, how many hold, and the private one."""
    rows = found["rows"]
    best = sum(row["pareto"] for row in rows)
    start = f"{len(rows)} operating points, {best} that no other beats"
    if rows[0]["primary"] is None or "leakage" not in found["axes"]:
        return f"{start}; leakage was not measured"
    before = plain_number(rows[0]["primary"]["auc"], 2)
    try:
        name = choose("private", rows).point
    except UserError:
        return f"{start}; the original's attack AUC is {before}"
    row = next(row for row in rows if row["name"] == name)
    return f"{start}; at the price of its size, {name} brings the attack from AUC {before} to {_auc(row)}"


def _auc(row: dict) -> str:
    return plain_number(row["primary"]["auc"], 2)


def render(found: dict) -> str:
    """The page of what `geoquant.frontier` returned."""
    fingerprinted, found = fingerprint(found), finite(found)
    rows = found["rows"]
    beside = found["baselines"]
    signs = {family: members[0] for family, members in BASELINES.items()}
    lines = {loss: curve.family_lines(rows, beside["families"], signs, loss) for loss in ("public", "domain")}
    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    panels = [
        (name, drawn)
        for name, loss in (("perplexity on public text", "public"), ("perplexity on unseen records", "domain"))
        if (drawn := curve.curve_panel(curve.dots(rows, loss, beside["chosen"]), f"rise of {name}", lines=lines[loss]))
    ]
    return rendered(
        "frontier.html.jinja",
        scripts=("copy.js", "sort.js"),
        p=found,
        headline=headline(found),
        panels=panels,
        legend=[(curve.mark(family, True), FAMILIES[family]) for family in families],
        measures=[MEASURES[name] for name in beside["measures"]],
        lines=[line for loss in lines for line in lines[loss]],
        mark=curve.mark,
        goals=goals_of(found),
        attack={key: name and attack_label(name)[0] for key, name in found["attacks"].items()},
        fingerprint=fingerprinted,
    )


def write_frontier(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write frontier.json and frontier.html, each by rename of a complete file."""
    return write_page(folder, "frontier", render(found), found)

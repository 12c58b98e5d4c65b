"""One point of a frontier, the chosen one, beside the baselines: fewer bits, interpolation, isotropic noise.

Measures, smaller is better on each: the axes of the control matrix (control.py), and

    exposure      mean bits over the planted canaries; noise: Z paired standard errors over the same canaries
    extraction    share of private spans extracted; noise: Newcombe's interval of a difference of two shares, made of
                  two Wilson intervals. It takes the shares as independent; on the same spans they are not, and the
                  noise of their difference is rather less.

Newcombe: Interval estimation for the difference between independent proportions: comparison of eleven methods,
Statistics in Medicine 1998 (method 10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from geoquant.control import AXES, Z, noise_of, outward, paired, values_of
from geoquant.errors import UserError, unknown_name
from geoquant.plan.dominance import BASELINES, LEVERS, at_level, line, versus
from geoquant.plan.goals import GOALS, SAME, choose
from geoquant.plan.points import ORIGINAL
from geoquant.plan.published import beside
from geoquant.privacy.statistics import guessed_right

__all__ = ["MEASURES", "against_baselines", "beside_published", "check_chosen", "pick", "share_noise"]

MEASURES = {
    "size": "size",
    "public": "loss on public text",
    "domain": "loss on unseen records",
    "leakage": "the attack",
    "exposure": "exposure",
    "extraction": "extraction",
}
LOSSES = {"public": "public text", "domain": "unseen records"}
REACH = ("any", "no_larger")  # points of any size; of those, the ones no larger than the chosen point
STANDING = {  # of a family at the leakage of the chosen point
    "cheaper": "less loss with",
    "undecided": "neither clearly more nor less loss with",
    "dearer": "more loss with",
    "never": "out of reach of",
}
RULE = (
    "The chosen point dominates another that is worse by more than the noise on one measure and better by more than it "
    "on none. Along a family's line, its points with no other to their lower left are joined; between two points, loss "
    "and leakage are taken as linear. Differences of perplexity are paired; that the leakage of both is an estimate is "
    "not in their intervals."
)


def check_chosen(wanted: str | None, names: Sequence[str]) -> None:
    """Raise UserError where `wanted` is neither a goal nor one of the points."""
    known = [name for name in names if name != ORIGINAL]
    if wanted is not None and wanted not in known and wanted not in GOALS:
        raise unknown_name("point or goal", wanted, [*known, *GOALS])


def pick(rows: Sequence[Mapping], axes: Sequence[str], wanted: str | None = None) -> tuple[str | None, str]:
    """(name of the chosen point, why it): the one that is asked for, by name or by goal; else the best of the levers.

    That is the point with levers that the goal `private` takes, or `balanced` where none is within the limit of the
    first. No name, and why, where there is none.
    """
    if any(row["name"] == wanted for row in rows):
        return wanted, "as asked"
    if wanted is not None and wanted not in GOALS:
        return None, f"the point {wanted!r} was not measured"
    if wanted is None and "leakage" not in axes:
        return None, "the records give no figure of leakage to choose by"
    if wanted is None and not any(row["family"] in LEVERS for row in rows):
        return None, "no point with a lever was measured"
    try:
        if wanted is not None:
            return choose(wanted, rows).point, f"the point that --goal {wanted} takes"
        names = {row["name"] for row in rows if row["family"] in LEVERS}
        try:
            return choose("private", rows, among=names).point, "of the points with levers the one for --goal private"
        except UserError:
            told = "of the points with levers the one for --goal balanced, for none serves --goal private"
            return choose("balanced", rows, among=names).point, told
    except UserError as error:
        return None, str(error)


def against_baselines(matrix: Mapping, measured: Sequence[Mapping], wanted: str | None = None) -> dict:
    """The part `baselines` of frontier.json: the chosen point, and by family what it dominates and what it does not.

    matrix: of control_matrix, made of `measured`. wanted: a name or a goal, see `pick`.
    """
    rows, axes = matrix["rows"], matrix["axes"]
    name, why = pick(rows, axes, wanted)
    told = {"chosen": name, "why": why, "measures": [], "rule": RULE, "sentence": "", "families": []}
    if name is None:
        return told | {"sentence": f"No point is compared with the baselines: {why}."}
    values, noise = _measures(rows, measured, matrix["attacks"]["primary"])
    there = [
        place
        for place, measure in enumerate(MEASURES)
        if np.isfinite(values[:, place]).any() and (measure in axes or measure not in AXES)
    ]
    names, values, noise = [list(MEASURES)[place] for place in there], values[:, there], noise[there]
    chosen = next(index for index, row in enumerate(rows) if row["name"] == name)
    families = []
    for family, members in BASELINES.items():
        others = [index for index, row in enumerate(rows) if row["family"] in members and index != chosen]
        found = _dominance(rows, values, noise, names, chosen, others)
        if "leakage" in names:
            found |= _at_its_leakage(rows, measured, chosen, others)
            found["standing"] = _standing(found)
        families.append({"family": family, **found, "verdict": _verdict(family, found)})
    return told | {"measures": names, "sentence": _sentence(name, families), "families": families}


def beside_published(rows: Sequence[Mapping], measured: Sequence[Mapping], attack: str | None) -> list[dict]:
    """The part `published` of frontier.json: the published control matrix, and the counterparts that were measured."""
    guessed = []
    for one in measured:
        sides = outward(one["scores"].get(attack))
        right = sides and guessed_right(*sides)
        guessed.append(right and {"value": right[0], "se": right[1]})
    return beside(rows, guessed)


# ---- measures


def _measures(
    rows: Sequence[Mapping], measured: Sequence[Mapping], attack: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values (points, measures), and the noise of their differences (measures, points, points)."""
    count = len(rows)
    bits = [_canaries(one) for one in measured]
    read = (("exposure", "mean"), ("extraction", "rate"))
    more = [[row[part][key] if row[part] else np.nan for part, key in read] for row in rows]
    noise = np.zeros((2, count, count))
    for i in range(count):
        for j in range(i):
            if bits[i] and bits[j]:
                both = [name for name in bits[i] if name in bits[j]]
                sides = ([bits[place][name] for name in both] for place in (i, j))
                noise[0, i, j] = Z * paired(*sides)["se"] if len(both) > 1 else np.inf  # one canary has no error
            if rows[i]["extraction"] and rows[j]["extraction"]:
                shares = [
                    (rows[place]["extraction"]["extracted"], rows[place]["extraction"]["spans"]) for place in (i, j)
                ]
                noise[1, i, j] = share_noise(*shares)
    noise = np.maximum(noise, noise.transpose(0, 2, 1))
    return np.hstack([values_of(rows), np.array(more, float)]), np.concatenate([noise_of(measured, attack), noise])


def _canaries(one: Mapping) -> dict[str, float]:
    """Exposure of every canary, in bits."""
    found = next(iter((one["privacy"] or {}).get("exposure") or []), None)
    return {canary["name"]: canary["bits"] for canary in found["canaries"]} if found else {}


def share_noise(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How far apart two shares (hits, trials) may lie and still not be told apart."""
    low, high = sorted((one, other), key=lambda pair: pair[0] / pair[1])
    return math.hypot(high[0] / high[1] - _wilson(*high)[0], _wilson(*low)[1] - low[0] / low[1])


def _wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, weight = hits / trials, Z * Z / trials
    middle = share + weight / 2
    half = Z * math.sqrt((share * (1 - share) + weight / 4) / trials)
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


# ---- one family


def _dominance(
    rows: Sequence[Mapping],
    values: np.ndarray,
    noise: np.ndarray,
    names: Sequence[str],
    chosen: int,
    others: Sequence[int],
) -> dict:
    found = {rows[index]["name"]: versus(values, noise, names, chosen, index) for index in others}
    return {
        "points": len(others),
        "dominated": [name for name, one in found.items() if one.dominates],
        "not_dominated": [
            {
                "name": name,
                "better_than_chosen": list(one.worse),
                "worse_than_chosen": list(one.better),
                "missing": list(one.missing),
            }
            for name, one in found.items()
            if not one.dominates
        ],
        "dominating": [name for name, one in found.items() if one.dominated],
    }


def _at_its_leakage(rows: Sequence[Mapping], measured: Sequence[Mapping], chosen: int, others: Sequence[int]) -> dict:
    """What the family costs where it leaks as much as the chosen point, and the lines that say so."""
    level = rows[chosen]["primary"]["two_sided"]
    most = rows[chosen]["bits"]["all_in"] + SAME
    leaks = [row["primary"]["two_sided"] if row["primary"] else np.nan for row in rows]
    there = [index for index in others if np.isfinite(leaks[index])]
    least = min(there, key=lambda index: leaks[index], default=None)
    told: dict = {
        "leakage": level,
        "least": None if least is None else {"name": rows[least]["name"], "leakage": leaks[least]},
        **{reach: {} for reach in REACH},
        "lines": {reach: {} for reach in REACH},
    }
    for reach in REACH:
        part = [index for index in there if reach == "any" or rows[index]["bits"]["all_in"] <= most]
        for loss in LOSSES:
            leak = np.array([leaks[index] for index in part])
            lost = np.array([rows[index][loss]["nll"] if rows[index][loss] else np.nan for index in part])
            told["lines"][reach][loss] = [rows[part[index]]["name"] for index in line(leak, lost)]
            told[reach][loss] = None
            mixed = at_level(leak, lost, level)
            if mixed is not None and rows[chosen][loss]:
                series = [_series(measured[index], loss) for index in part]
                ends = [rows[part[index]]["name"] for index in (mixed.first, mixed.second)]
                told[reach][loss] = {
                    "between": ends[:1] if ends[0] == ends[1] else ends,
                    "share": mixed.share,
                    "above_chosen": paired(_series(measured[chosen], loss), mixed.of(series)),
                }
    return told


def _series(one: Mapping, loss: str) -> list:
    """Loss by window of public text, or by record."""
    return one["public"]["windows"] if loss == "public" else one["domain"]


# ---- sentences


def _sentence(name: str, families: Sequence[Mapping]) -> str:
    there = [one for one in families if one["points"]]
    if not there:
        return f"{name!r}: no baseline was measured."
    parts = [f"{len(one['dominated'])} of {one['points']} points of {one['family']}" for one in there]
    told = [f"{name!r} dominates {_listed(parts)}."]
    against = [point for one in there for point in one["dominating"]]
    told.append(f"Dominated by {_quoted(against)}." if against else "No baseline dominates it.")
    standing = {word: [one["family"] for one in there if one.get("standing") == word] for word in STANDING}
    standings = [f"{STANDING[word]} {_listed(names)}" for word, names in standing.items() if names]
    if standings:
        told.append(f"At its leakage, at any size: {'; '.join(standings)}.")
    return " ".join(told)


def _verdict(family: str, found: Mapping) -> str:
    """What the numbers say of one family."""
    start = family.capitalize()
    if not found["points"]:
        return f"{start}: no point was measured."
    told = [f"{start}: {len(found['dominated'])} of {found['points']} points are dominated."]
    reasons: dict[str, list[str]] = {}
    for one in found["not_dominated"]:
        reasons.setdefault(_reason(one), []).append(one["name"])
    if reasons:
        told.append(f"Not {'; '.join(f'{_quoted(names)} ({why})' for why, names in reasons.items())}.")
    if found["dominating"]:
        told.append(f"The chosen point is dominated by {_quoted(found['dominating'])}.")
    return " ".join([*told, _reading(found) if "least" in found else "Leakage was not compared."])


def _reason(one: Mapping) -> str:
    """Why a point is not dominated."""
    if one["missing"]:
        return f"{_listed([MEASURES[name] for name in one['missing']])} measured of one of the two alone"
    if one["better_than_chosen"]:
        return f"better on {_listed([MEASURES[name] for name in one['better_than_chosen']])}"
    return "not told apart"


def _standing(found: Mapping) -> str | None:
    """How dear the family is where it leaks as much as the chosen point, at any size; None where nothing is known."""
    if found["least"] is None:
        return None
    if found["least"]["leakage"] > found["leakage"]:
        return "never"
    above = [one["above_chosen"] for one in found["any"].values() if one]
    if all(one["value"] > Z * one["se"] for one in above):
        return "dearer"
    return "cheaper" if all(-one["value"] > Z * one["se"] for one in above) else "undecided"


def _reading(found: Mapping) -> str:
    """What the family costs at the leakage of the chosen point, at any size and at its size."""
    least, level = found["least"], f"|AUC - 0.5| {found['leakage']:.3f}"
    if least is None:
        return "Of none was the attack measured."
    if found["standing"] == "never":
        return (
            f"None leaks as little as the chosen point ({level}): the least is {least['leakage']:.3f} "
            f"({least['name']!r})."
        )
    told = f"Where it leaks as little as the chosen point ({level}), its perplexity beside that one's is "
    told += _costs(found["any"])
    if found["no_larger"] == found["any"]:
        return f"{told}, at no larger a size."
    if not any(found["no_larger"].values()):
        return f"{told}; no point that is no larger leaks as little."
    return f"{told}; with points that are no larger, {_costs(found['no_larger'])}."


def _costs(by_loss: Mapping[str, Mapping | None]) -> str:
    parts = []
    for loss, one in by_loss.items():
        if one is not None:
            value, half = one["above_chosen"]["value"], Z * one["above_chosen"]["se"]
            beyond = "" if abs(value) > half else ", within the noise"
            spread = f"{_percent(value - half)} to {_percent(value + half)}{beyond}"
            parts.append(f"{_percent(value)} on {LOSSES[loss]} ({spread})")
    return _listed(parts)


def _percent(nats: float) -> str:
    """A rise of the loss as one of perplexity; beyond a doubling no decimals."""
    rise = 100 * math.expm1(min(nats, 20.0))
    return f"{rise:+,.0f}%" if rise >= 100 else f"{rise:+.1f}%"


def _quoted(names: Sequence[str]) -> str:
    return _listed([repr(name) for name in names])


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

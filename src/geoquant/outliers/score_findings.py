"""What the scores of an analysis say, a sentence each, computed from the numbers.

A site is above its null where `(value - null) / s` is beyond the 97.5% point of Student's t, with `s^2 = se^2 +
sd^2 (1 + 1/D)`: the standard error of the value, and the standard deviation sd of D draws of the null, whose mean is
itself uncertain. Both rest on few numbers; degrees of freedom follow Welch (Biometrika 1947) and Satterthwaite
(Biometrics Bulletin 1946). One site in 40 is above its null by chance, and one below.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

__all__ = ["headlines", "score_findings", "surely"]

SAMPLED = 48  # rows at most, of which a standard error over rows is sure to have been made


def score_findings(sites: list[dict], scores: list[dict], parts: int, draws: int) -> list[str]:
    """Where each score is largest, and at how many sites it lies beyond its null.

    parts: of a text, that standard errors were made from. draws: of a null.
    """
    return [sentence for _, _, sentence in _found(sites, scores, parts, draws)]


def headlines(sites: list[dict], scores: list[dict], parts: int, draws: int, shown: int = 2) -> list[dict]:
    """The same sentences under what their scores are about: `title`, the `first` few, whose scores are above their null
    at the most sites, and the `rest`.
    """
    themes: dict[str, list[tuple[float, str]]] = {title: [] for title in THEMES}
    for score, above, sentence in _found(sites, scores, parts, draws):
        themes[next(title for title, holds in THEMES.items() if holds(score))].append((above, sentence))
    told = []
    for title, own in themes.items():
        ordered = [sentence for _, sentence in sorted(own, key=lambda one: -one[0])]
        if ordered:
            told.append({"title": title, "first": ordered[:shown], "rest": ordered[shown:]})
    return told


THEMES = {  # by what a score needs and counts in, so that a new file finds its place
    "Private and unseen records": lambda score: bool({"private", "domain"} & set(score["needs"])),
    "What rounding costs": lambda score: score["unit"].endswith("per token"),
    "Weights by themselves": lambda score: score.get("error_over") == "rows" or "base" in score["needs"],
    "Inputs and outputs": lambda score: True,
}


def _found(sites: list[dict], scores: list[dict], parts: int, draws: int) -> list[tuple[dict, float, str]]:
    """Each score with the share of its sites that are above its null, and its sentence."""
    told = []
    for score in scores:
        rows = [(site["scores"][score["name"]], site) for site in sites if score["name"] in site["scores"]]
        rows = [(one, site) for one, site in rows if one["value"] is not None]
        if not rows:
            continue
        one, site = max(rows, key=lambda row: row[0]["value"])
        title = score["title"][0].upper() + score["title"][1:]
        null = "none" if one["null"] is None else f"{one['null']:.3g}"
        above, against = _against(rows, score, parts, draws)
        told.append((score, above, f"{title}: largest at {site['name']} ({one['value']:.3g}, null {null}); {against}."))
    return told


def surely(rows: list[tuple[dict, dict]], score: dict, parts: int, draws: int) -> Float[np.ndarray, " rows"]:
    """Of each site 1 above its null, -1 below, 0 where that is not sure; NaN where error or null are unknown.

    rows: (what is said of the score, the site).
    """
    names = ("value", "null", "se", "null_sd")
    # An analysis of an older release knows one draw of its null and not how far another would go.
    read = [[np.nan if (value := one.get(name, 0.0)) is None else value for name in names] for one, _ in rows]
    value, null, se, sd = np.array(read, float).reshape(-1, 4).T
    own, drawn = se**2, sd**2 * (1 + 1 / draws)
    of_rows = score.get("error_over") == "rows"
    freedom = np.array([max(1, min(SAMPLED, site["shape"][0]) - 1) if of_rows else parts - 1 for _, site in rows])
    whole = own + drawn
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = whole**2 / (own**2 / freedom + drawn**2 / (draws - 1))
        sure = student.ppf(0.975, welch) * np.sqrt(whole)
    sure = np.where(whole > 0, sure, np.where(np.isnan(whole), np.nan, 0.0))
    gap = value - null
    return np.where(np.isnan(gap) | np.isnan(sure), np.nan, np.sign(gap) * (np.abs(gap) > sure))


def _against(rows: list[tuple[dict, dict]], score: dict, parts: int, draws: int) -> tuple[float, str]:
    """The share of sites above their null, and in words how many are above and below, where a null can tell."""
    if score.get("same"):
        known = [(one["beyond"], site["shape"][1]) for one, site in rows if one["beyond"] is not None]
        share = sum(count for count, _ in known) / max(1, sum(size for _, size in known))
        told = f"of whole sites the null is the same by construction; {share:.1%} of columns beyond 99% of their null's"
        return 0.0, told
    judged = surely(rows, score, parts, draws)
    if np.isnan(judged).all():
        return 0.0, "without a null"
    above, below = (int((judged == sign).sum()) for sign in (1, -1))
    return above / len(rows), f"{above} of {len(rows)} sites above their null, {below} below"

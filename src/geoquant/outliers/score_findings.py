"""What the scores of an analysis say, a sentence each, computed from the numbers."""

from __future__ import annotations

from scipy.stats import t as student

__all__ = ["score_findings"]

SAME = 1e-3  # of the null: what order of summation and five digits leave of equal numbers


def score_findings(sites: list[dict], scores: list[dict], parts: int) -> list[str]:
    """Where each score is largest, and at how many sites it lies beyond its null.

    parts: that standard errors were made from. So few leave them uncertain themselves, so that a site counts from the
    97.5% point of Student's t on: 1 in 40 by chance to either side.
    """
    sure, told = float(student.ppf(0.975, parts - 1)), []
    for score in scores:
        rows = [(site["scores"][score["name"]], site) for site in sites if score["name"] in site["scores"]]
        rows = [(one, site) for one, site in rows if one["value"] is not None]
        if not rows:
            continue
        one, site = max(rows, key=lambda row: row[0]["value"])
        title = score["title"][0].upper() + score["title"][1:]
        null = "none" if one["null"] is None else f"{one['null']:.3g}"
        against = _against([row for row, _ in rows], sure)
        told.append(f"{title}: largest at {site['name']} ({one['value']:.3g}, null {null}); {against}.")
    return told


def _against(rows: list[dict], sure: float) -> str:
    """How many sites are above their null, and below it, where a null could tell."""
    known = [one for one in rows if None not in (one["se"], one["null"])]
    if not known:
        return "without a null"
    if all(abs(one["value"] - one["null"]) <= SAME * abs(one["null"]) for one in known):
        return "of whole sites the null is the same by construction"
    above, below = (
        sum(1 for one in known if sign * (one["value"] - one["null"]) > sure * one["se"]) for sign in (1, -1)
    )
    if not any(one["se"] for one in known):
        return f"{above} of {len(rows)} sites are larger than one draw of their null"
    return f"{above} of {len(rows)} sites above their null, {below} below"

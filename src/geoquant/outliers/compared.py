"""Do two identifications agree? Labels of groups of one name: of two models, two fine-tunes of one base, two seeds.

What is a property of such weights, and not of one model and its texts, should be found again in another. Groups that
only one of the two has are left out; `depth:K` (outliers/groups.py) has the same groups in every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from geoquant.errors import UserError
from geoquant.outliers.leaderboard import FEWEST, leaderboard
from geoquant.outliers.taxonomy import kappa
from geoquant.runs import read_json

__all__ = ["check_comparable", "compared", "read_identity", "sentences"]

OF = {"label": lambda row: row["label"]} | {
    name: (lambda row, name=name: str(row[name])) for name in ("functional", "sensitive")
}


def read_identity(folder: Path) -> dict:
    """What a finished identification says. Raises UserError where there is none."""
    if not (folder / "identity.json").exists():
        raise UserError(f"{folder} holds no identity.json", fix="run geoquant identify first, to its end")
    told = read_json(folder / "identity.json", model=dict, groups=str, rows=list, settings=dict, seed=int)
    wanted = {"group", "intervention", "label", "functional", "sensitive", "effect"}
    if any(not wanted <= set(row) for row in told["rows"]):
        raise UserError(f"{folder / 'identity.json'} is damaged: a part is missing", fix="run geoquant identify again")
    return told


def check_comparable(told: Mapping, folder: Path, asked: Sequence[str], groups: Sequence[str], grouping: str) -> None:
    """Raise UserError where the other identification has no intervention, or no group, in common with this one."""
    others = told["settings"].get("do", [])
    if not set(asked) & set(others):
        raise UserError(
            f"{folder} has no intervention in common with this identification",
            got=", ".join(others),
            wanted=", ".join(asked),
            fix="give one of them with --do",
        )
    if not set(groups) & {row["group"] for row in told["rows"]}:
        raise UserError(
            f"{folder} has no group of the same name",
            got=f"--groups {told['groups']} there, {grouping} here",
            wanted="groups that pair",
            fix="give --groups depth:K to both, with one K",
        )


def compared(rows: Sequence[Mapping], told: Mapping, folder: Path) -> list[dict]:
    """Cohen's kappa of each shared intervention, of whole labels and of their parts, by bootstrap over groups.

    rows, told: this identification's and the other's, as in identity.json. rank, rank_ci: Spearman's correlation of the
    rises of public NLL, which sees order where labels are all alike; None where it cannot be told.
    """
    found = []
    for do in dict.fromkeys(row["intervention"] for row in rows):
        own, other = ({row["group"]: row for row in side if row["intervention"] == do} for side in (rows, told["rows"]))
        shared = [name for name in own if name in other]
        if not shared:
            continue
        ranks = _ranks([(own[name], other[name]) for name in shared])
        for of, read in OF.items():
            pair = [[read(side[name]) for name in shared] for side in (own, other)]
            found.append(
                {
                    "with": str(folder),
                    "model": told["model"].get("name"),
                    "sha256": told["model"].get("sha256"),
                    "seed": told["seed"],
                    "intervention": do,
                    "of": of,
                    **asdict(kappa(*pair)),
                    "left": len(own) + len(other) - 2 * len(shared),
                    **ranks,
                }
            )
    return found


def _ranks(pairs: Sequence[tuple[Mapping, Mapping]]) -> dict:
    rises = [[row["effect"]["public"]["value"] for row in pair] for pair in pairs]
    known = np.array([pair for pair in rises if None not in pair], float).reshape(-1, 2)
    if len(known) < FEWEST:
        return {"rank": None, "rank_ci": None}
    one = leaderboard({"rise": known[:, 0]}, known[:, 1])[0]
    if not np.isfinite(one.rho):
        return {"rank": None, "rank_ci": None}
    return {"rank": one.rho, "rank_ci": list(one.ci)}


def sentences(found: Sequence[Mapping]) -> list[str]:
    """One for each identification and intervention, on whole labels; one more on what is sensitive, if anything is."""
    told = []
    for one in found:
        if one["of"] == "functional" or (one["of"] == "sensitive" and one["value"] is None):
            continue
        what = "the same label to" if one["of"] == "label" else "the same sensitivity to"
        text = (
            f"{one['intervention']}: this model and {one['model']} ({one['with']}) give {what} "
            f"{round(one['same'] * one['count'])} of {one['count']} groups of one name"
        )
        if one["value"] is None:
            text += ", all alike, so that chance would agree as well"
        else:
            text += f", kappa {one['value']:+.2f} ({one['ci'][0]:+.2f} to {one['ci'][1]:+.2f}; chance: 0)"
        if one["of"] == "label" and one["rank"] is not None:
            low, high = one["rank_ci"]
            text += f"; rises of public NLL: rank correlation {one['rank']:+.2f} ({low:+.2f} to {high:+.2f})"
        told.append(f"{text}.")
    return told

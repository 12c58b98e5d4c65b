"""What an analysis says of mixtures of experts: who is chosen how often, and how far rounding distorts them together.

An expert's scores are means over its own tokens: what its error costs a text is that times its share of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from geoquant.geometry.distortion import expert_distortion

__all__ = ["mixtures", "sentences"]

EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
NAMED = 6  # experts that a sentence names


def mixtures(sites: Sequence[dict]) -> list[dict]:
    """Of each module of experts among the sites of an analysis, in their order:

    tokens, frequencies: of public text, how many tokens reach each expert, and their shares of all routes. never: who
    is chosen by no token of it. distortion: by matrix, `sum_k f_k MD_k` and the same of the null.
    """
    found: dict[str, dict[str, dict[int, dict]]] = {}
    blocks: dict[str, int] = {}
    for site in sites:
        if match := EXPERT.fullmatch(site["name"]):
            module, index, matrix = match[1], int(match[2]), match[3]
            found.setdefault(module, {}).setdefault(matrix, {})[index] = site
            blocks[module] = site["block"]
    return [_one(module, blocks[module], matrices) for module, matrices in found.items()]


def _one(module: str, block: int, matrices: dict[str, dict[int, dict]]) -> dict:
    first = next(iter(matrices.values()))
    tokens = {index: int(site["tokens"].get("public", 0)) for index, site in sorted(first.items())}
    routes = sum(tokens.values())
    return {
        "name": module,
        "block": block,
        "experts": list(tokens),
        "tokens": list(tokens.values()),
        "frequencies": [count / routes if routes else 0.0 for count in tokens.values()],
        "never": [index for index, count in tokens.items() if not count],
        "distortion": {matrix: _distortion(own, tokens) for matrix, own in matrices.items()} if routes else {},
    }


def _distortion(sites: dict[int, dict], tokens: dict[int, int]) -> dict[str, float] | None:
    """Weighted by tokens; None where an expert that is chosen has none."""
    known = {index: site["scores"].get("distortion", {}) for index, site in sites.items() if tokens[index]}
    if not known or any(one.get(key) is None for one in known.values() for key in ("value", "null")):
        return None
    shares = [tokens[index] for index in known]
    return {key: expert_distortion([one[key] for one in known.values()], shares) for key in ("value", "null")}


def sentences(found: Sequence[dict]) -> list[str]:
    """At most three: on routing, on experts without any token, on distortion."""
    if not found:
        return []
    told = []
    peak, place, expert = max(
        (share, one["name"], index)
        for one in found
        for index, share in zip(one["experts"], one["frequencies"], strict=True)
    )
    low = min(share for one in found for share in one["frequencies"])
    told.append(
        f"Experts: {sum(len(one['experts']) for one in found)} in {len(found)} blocks; of a block's routes of public "
        f"text one gets {low:.1%} to {peak:.1%}, the most expert {expert} of {place}. Scores are means over "
        "an expert's own tokens."
    )
    never = [f"{one['name']}.{index}" for one in found for index in one["never"]]
    if never:
        names = ", ".join(never[:NAMED]) + (f" and {len(never) - NAMED} more" if len(never) > NAMED else "")
        told.append(f"Experts that no token of public text reached, and that have no scores: {names}.")
    ranked = [(part, one, matrix) for one in found for matrix, part in one["distortion"].items() if part]
    if ranked:
        part, one, matrix = max(ranked, key=lambda row: row[0]["value"])
        told.append(
            f"Manifold distortion of rounded experts, weighted by routing: largest for {matrix} of {one['name']} "
            f"({part['value']:.3g}, null {part['null']:.3g})."
        )
    return told

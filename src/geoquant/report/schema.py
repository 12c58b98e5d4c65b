"""What `report.json` must hold for a page to be made of it.

Schema 1 grows by optional keys only: a report written before a key existed still renders, without what the key tells.
A key that changes its meaning or goes away makes schema 2.
"""

from __future__ import annotations

from geoquant.errors import UserError

__all__ = ["check_schema"]

NUMBER = (int, float)
_QUALITY = {"perplexity": NUMBER, "nll": NUMBER, "se": NUMBER, "tokens": int}
_FORGOT = ("sequences", "before", "after", "distance")
_DELTA = {"value": NUMBER, "se": NUMBER}
# A dict lists keys, those with a "?" came later and may be absent, a one-element list describes each entry, a tuple or
# type is a leaf. None is a missing measurement and passes everywhere but at the places in _NEVER_NULL.
_EXTRACTION = {
    **{"subject": str, "kind": str, "spans": int, "extracted": int, "rate": NUMBER, "ci": list},
    **{"control_rate": NUMBER, "sampled?": dict, "control_sampled?": dict},
}
_SCHEMA: dict = {
    "schema": int,
    "model": {"name": str, "architecture": str, "parameters": int, "source": str, "dtype": str},
    "recipe": dict,
    "versions": dict,
    "command": str,
    "created": str,
    "seed": int,
    "hashes": dict,
    "size": dict.fromkeys(("bits_per_weight", "linear_bytes", "total_bytes", "original_bytes", "kept_bytes"), NUMBER),
    "quality": {
        "text": str,
        "windows": int,
        "window": int,
        "original": _QUALITY,
        "quantized": _QUALITY,
        "delta_nll": _DELTA,
        "kl": _DELTA,
        "tasks": [{"name": str, **dict.fromkeys(("original", "quantized", "delta", "se"), NUMBER), "items": int}],
    },
    "privacy": {
        "n_members": int,
        "n_nonmembers": int,
        "attacks": [
            {"name": str, "subject": str, "auc": NUMBER, "ci": list, "tpr_at_fpr": dict, "roc": dict}
            | {"ci_delong?": list, "p?": NUMBER, "p_holm?": NUMBER}
        ],
        "comparisons?": [
            dict.fromkeys(("attack", "from", "to"), str)
            | {"difference": NUMBER, "ci": list}
            | dict.fromkeys(("z", "p", "p_holm"), NUMBER)
        ],
        "verdict?": [{"subject": str, "attack": str, "separates": bool, "level": NUMBER}],
        "no_verdict?": str,
        "gate?": {"valid": bool, "ci": list, "view": str, "n_members": int, "n_nonmembers": int}
        | dict.fromkeys(("auc", "p", "level", "alarm"), NUMBER),
        "near_duplicates?": {"threshold": NUMBER, "pairs": int, "nonmembers": int, "first": [list]},
        "extraction": [_EXTRACTION],
        "prompted?": [_EXTRACTION],
        "suffixes?": [{"prefix": int, "tokens": NUMBER} | _EXTRACTION],
        "exposure": [
            {"subject": str, "canaries": [{"name": str, "repeats": int, "bits": NUMBER}]}
            | {"mean_bits": NUMBER, "limit_bits": NUMBER, "estimator": str}
        ],
        "shadows?": {"models": [{"records": int, "auc": NUMBER, "ci": list}], "settings": dict, "base": str},
        "one_run?": [
            {"subject": str, "guesses": int, "correct": int, "m": int, "covers": str}
            | dict.fromkeys(("epsilon", "confidence", "delta", "most"), NUMBER)
        ],
        # What a guarantee must not be printed without.
        "guarantee": {"adjacency": str, "mechanism": str, "epsilon": NUMBER, "delta": NUMBER, "scope": str}
        | dict.fromkeys(("not_covered", "sentence"), str),
    },
    # What levers did to the weights before anything was solved; None where there were none.
    "refinement?": {"passes": int, "kept_pass": int, "moved": NUMBER}
    | {name: {"before": kind, "after": kind} for name, kind in (("losses", dict), ("bits_per_weight", NUMBER))}
    | {"blocks?": {"passes": int, "kept": bool, "errors": [dict], "losses": dict}}
    | {"geometry?": {"weight": NUMBER, "threshold": NUMBER, "lowered": NUMBER, "classes": dict}},
    # What a plan file had decided, and what came of it; None without one.
    "plan?": {"sha256": str, "effects_sha256": str, "looked": bool, "anchors": bool, "budgets": dict, "totals": dict}
    | {"bytes": {"planned": NUMBER, "got": NUMBER}, "stages": [{"name": str, "planned": NUMBER, "got": NUMBER}]},
    "protection?": {"lever": str, "anchor": NUMBER, "distance": {"before": NUMBER, "after": NUMBER}}
    | {"kept?": {"layers": int, "by_share": int, "unchanged": int, "private": NUMBER, "function": NUMBER}}
    | {"forgot?": {"made": int, "divergence": NUMBER} | dict.fromkeys(_FORGOT, dict)},
    # Why these options: what was wanted, and the points of a frontier that it was chosen from, if there is one.
    "goal?": {**dict.fromkeys(("goal", "use", "point", "why", "frontier"), str), "rows": [dict]},
    "sites": [
        dict.fromkeys(("name", "kind", "method", "order", "reason"), str)
        | {"block": int, "shape": list, "kept": int, "kept_columns": list, "damping": NUMBER, "bits": NUMBER}
        | dict.fromkeys(("bits_per_weight", "error", "heldout_error", "expected_error", "bound", "clip_rate"), NUMBER)
        | dict.fromkeys(("sphere_bound?", "gap_db?", "headroom_db?", "rows_db?"), NUMBER)
        | {"profile?": {"lengths": [NUMBER], "steps": [NUMBER]}}
    ],
    "exports": [
        {"format": str, "path": str, "bytes": int, "snippet": str}
        | {"verified": {"max_abs_diff": NUMBER, "ok": bool, "readers": dict}}
    ],
    "warnings": [str],
    "timings": dict,
    "peak_memory_bytes": int,
    "solver": dict.fromkeys(("flops", "seconds", "gemm_peak_flops", "share_of_peak"), NUMBER),
}
_NEVER_NULL = {
    "model",
    "size",
    "quality",
    "quality.original",
    "quality.quantized",
    "quality.delta_nll",
    "sites",
}
_GUARANTEE = "privacy.guarantee"


def check_schema(report: dict) -> None:
    """Raise `UserError` naming the first key of the contract that is absent or of the wrong type."""
    _check(report, _SCHEMA, "")
    if report["schema"] != 1:
        raise UserError("report.json has another schema", got=report["schema"], wanted=1, fix="write it again")


def _check(value: object, spec: object, where: str) -> None:
    if value is None and where and where not in _NEVER_NULL and not where.startswith(f"{_GUARANTEE}."):
        return
    name = where or "report.json"
    if isinstance(spec, dict):
        _expect(value, dict, name)
        for wanted, inner in spec.items():
            key = wanted.removesuffix("?")
            if key not in value:
                if key != wanted:
                    continue
                reason = "no guarantee is printed without it" if where == _GUARANTEE else "write the report again"
                raise UserError("report.json misses a key", wanted=f"{where}.{key}".lstrip("."), fix=reason)
            _check(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(spec, list):
        _expect(value, (list, tuple), name)
        for index, item in enumerate(value):
            _check(item, spec[0], f"{where}[{index}]")
    else:
        _expect(value, (list, tuple) if spec is list else spec, name)


def _expect(value: object, kinds: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise UserError(f"report.json: {name} has the wrong type", got=type(value).__name__, wanted=wanted)

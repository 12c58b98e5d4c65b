"""Measurements of operating points made by hand, as operating.operate would have written them."""

from __future__ import annotations

import numpy as np

from geoquant.comparing import against_baselines, beside_published

WINDOWS, RECORDS = 20, 60


def measured(
    seed: int,
    *,
    bits=3.3,
    loss=0.0,
    shift=1.0,
    spread=0.01,
    guarantee=None,
    verdict=None,
    canaries=(),
    extracted=None,
) -> dict:
    """A model: everything of it differs from the others by its own shift and a little noise of its own.

    canaries: exposure of each, in bits; extracted: of RECORDS private spans.
    """
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    windows = common.normal(3, 0.5, WINDOWS) + loss + spread * own.normal(size=WINDOWS)
    domain = common.normal(2, 0.3, RECORDS) + loss + spread * own.normal(size=RECORDS)
    outside, inside = common.normal(0, 1, RECORDS), common.normal(0, 1, RECORDS) + shift
    attack = {"subject": "quantized", "ci": [0.6, 0.9], "tpr_at_fpr": {"0.1": {"tpr": 0.3, "ci": [0.2, 0.4]}}}
    area = float((inside[:, None] > outside).mean())
    return {
        "bits": {"all_in": bits, "coded": bits, "share": 1.0, "embeddings": True, "kept": 0.0},
        "public": {
            "perplexity": float(np.exp(windows.mean())),
            "nll": float(windows.mean()),
            "se": 0.1,
            "tokens": 640,
            "windows": windows.tolist(),
        },
        "domain": domain.tolist(),
        "scores": {"reference": [inside.tolist(), outside.tolist()]},
        "privacy": {
            "attacks": [
                {**attack, "name": "reference", "auc": area},
                {**attack, "name": "loss", "auc": 0.6},
                {**attack, "name": "min-k", "auc": 0.35},
            ],
            "extraction": [] if extracted is None else [_spans(extracted)],
            "exposure": [_secrets(canaries)] if len(canaries) else [],
            "exposure_control": None,
            "no_verdict": verdict,
        },
        "tasks": [],
        "guarantee": guarantee,
        "warnings": [],
        "seconds": 1.0,
    }


def _spans(extracted: int) -> dict:
    none = {"control_extracted": 0, "control_spans": RECORDS, "ci": [0.0, 1.0]}
    return {"kind": "all", "extracted": extracted, "spans": RECORDS, "rate": extracted / RECORDS, **none}


def _secrets(bits) -> dict:
    return {"limit_bits": 20.0, "canaries": [{"name": f"c{place}", "bits": one} for place, one in enumerate(bits)]}


def page_of(matrix: dict, parts: list[dict], chosen: str | None = None) -> dict:
    """What `frontier` would return of these measurements."""
    return {
        **matrix,
        "baselines": against_baselines(matrix, parts, chosen),
        "published": beside_published(matrix["rows"], parts, matrix["attacks"]["primary"]),
        "schema": 1,
        "model": {"name": "toy", "source": "toy"},
        "hashes": {"model": "0" * 64},
        "settings": {"seed": 0},
        "records": {"members": RECORDS, "nonmembers": RECORDS},
        "no_verdict": None,
        "text": {"text": "a text", "tokens": 640},
        "left_out": ["left out: <b>one</b> (this version has no option spin)"],
        "failed": [{"name": "bad", "error": "it broke"}],
        "versions": {},
        "command": "geoquant frontier",
        "created": "2026-11-23T18:00:00+00:00",
    }

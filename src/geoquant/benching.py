"""The geometry benchmark: which number that can be had beforehand foretells what rounding a layer will do?

Every site is rounded alone (nearest codes, groups of 64) at each bit width, and what that does is measured: the loss on
public text, on unseen records, and the attack. Every score of an analysis is then ranked against it, with intervals,
beside what anybody would guess first (depth, size, the length of the error).

    DIR/
      manifest.json         the analysis, the texts and the settings; another benchmark does not go on in this folder
      effects.jsonl         one line per site and bit width, as soon as it is measured: a killed benchmark goes on
      bench.json, bench.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from geoquant.data.records import Record, as_records, check_split
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.examine import check_context
from geoquant.folders import begin, claim
from geoquant.inputs import analysis_hash, base_scores, check_same_model, public_windows, read_analysis, told_of
from geoquant.lines import each_once
from geoquant.manifest import versions
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded, load, locate
from geoquant.model.paging import map_weights
from geoquant.model.walk import read_weight, site_modules, walk, within
from geoquant.outliers.effects import Baseline, Material, effect, open_baseline
from geoquant.outliers.first_order import first_order
from geoquant.outliers.interventions import Intervention, Part
from geoquant.outliers.leaderboard import FEWEST, ceiling, leaderboard
from geoquant.outliers.references import MEASURES as GEOMETRY
from geoquant.outliers.references import quartiles, reference_values
from geoquant.progress import Progress, silent
from geoquant.reporting import Clock, forget_peak_memory, peak_memory_bytes
from geoquant.runs import check_writable

__all__ = ["bench"]

OURS = ("manifest.json", "effects.jsonl", "bench.json", "bench.html")
BITS = (2, 3, 4)
GUESSES = ("depth", "size", "norm")
LEAST = 4  # records of a side: an interval of fewer says nothing


def bench(
    model: str | Path,
    out: str | Path,
    *,
    analysis: str | Path,
    base: str | Path | None = None,
    private: str | Path | Sequence[str | Record] | None = None,
    domain: str | Path | Sequence[str | Record] | None = None,
    text: str | Path | None = None,
    windows: int = 8,
    window: int = 256,
    records: int = 100,
    bits: Sequence[int] = BITS,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    command: str = "geoquant.bench",
) -> dict:
    """Rank every score of `analysis` (the folder of a finished one of this model) against measured effects.

    text: public text to measure on (default: the end of the built-in one, of which an analysis reads the start).
    private, domain: records that the model was trained on, and others of the same kind that it has not seen: both or
    none. base: calibrates the attack. Returns what bench.json holds; raises UserError for what the user can mend.
    """
    if (private is None) != (domain is None):
        raise UserError("effects on an attack need both sides", wanted="--private and --domain, or neither")
    if private is not None and records < LEAST:
        raise UserError(f"--records {records}", wanted=f"at least {LEAST}")
    if windows < 1 or window < 2:
        raise UserError(f"--windows {windows} --window {window}", wanted="a window at least, of two tokens or more")
    if not bits or any(not 2 <= one <= 8 for one in bits):
        raise UserError(f"--bits {' '.join(map(str, bits))}", wanted="whole numbers from 2 to 8")
    for one in (model, *(() if base is None else (base,))):
        locate(str(one))
    told = read_analysis(Path(analysis))
    if len(told["sites"]) < FEWEST:
        raise UserError(
            f"{analysis} knows {len(told['sites'])} layers", wanted=f"at least {FEWEST}: fewer have no rank correlation"
        )
    sides = [
        () if given is None else as_records(given, name)[:records]
        for name, given in (("private", private), ("domain", domain))
    ]
    if sides[0]:
        check_split(*sides, minimum=LEAST)
    folder, clock = claim(Path(out), OURS, "a benchmark"), Clock()
    check_writable(folder / "manifest.json")
    forget_peak_memory()
    with clock("load"):
        reference = None
        if base is not None and private is not None:
            # Dropped before the model is read.
            reference = base_scores(load(str(base), device=device), str(base), str(model), sides, progress)
        loaded = load(str(model), device=device)
        check_same_model(told, Path(analysis), str(model), model_hash(loaded.model))
        stacked = _drop_stacked(told, loaded)
        check_context(loaded, window)
        public = public_windows(loaded, text, window, windows)
    facts = {
        "model": told["model"],
        "analysis_sha256": analysis_hash(Path(analysis)),
        "texts": {
            "public": {"source": public.source, "sha256": public.sha256, "windows": windows, "window": window},
            "private": told_of(sides[0]),
            "domain": told_of(sides[1]),
        },
        "settings": {"bits": list(bits), "seed": seed, "reference": base is not None},
    }
    begin(folder, facts, command, "a benchmark")
    with clock("effects"):
        material = Material(public, members=sides[0], nonmembers=sides[1], reference=reference)
        found = _effects(folder, loaded, material, [site["name"] for site in told["sites"]], bits, progress)
    with clock("first order"):
        slopes = _first_order(loaded, public, bits, progress)
    for (site, one), line in found.items():
        line["first_order"] = slopes.get((site, one))
    with clock("geometry"):
        references = _references(told, loaded, bits, seed, progress)
    predictors = _predictors(told, loaded)
    boards = [board for one in bits for board in _boards(predictors, found, told, one, seed)]
    report = {
        "schema": 1,
        **facts,
        "predictors": {name: title for name, (title, _) in predictors.items()},
        "boards": boards,
        "geometry": GEOMETRY,
        "references": references,
        "effects": list(found.values()),
        "findings": [sentence(board) for board in boards] + stacked + _same_text(told, public, text),
        "versions": versions(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    from geoquant.report.bench import write_bench

    write_bench(folder, report)
    return report


def _drop_stacked(told: dict, loaded: Loaded) -> list[str]:
    """Leave out sites that are slices of a parameter, which cannot be rounded alone; a sentence if there are any."""
    modules = site_modules(loaded.model)
    kept = [site for site in told["sites"] if site["name"] in modules]
    left = len(told["sites"]) - len(kept)
    told["sites"] = kept
    return [f"{left} experts' matrices, which one parameter holds together, were not rounded."] if left else []


def _same_text(told: dict, public: Windows, text: str | Path | None) -> list[str]:
    """A sentence where harm is measured on what scores were made from; of the built-in text it is another end."""
    if text is None or told["texts"]["public"]["source"] != public.source:
        return []
    return ["The analysis read this very text from its start, too: scores have seen what they are judged on."]


# ---- effects


def _effects(
    folder: Path, loaded: Loaded, material: Material, sites: list[str], bits: Sequence[int], progress: Progress
) -> dict[tuple[str, int], dict]:
    """The effect of each site and bit width; those on disk are not measured again."""

    def begin() -> Callable[[tuple[str, int]], dict]:
        baseline = open_baseline(loaded.model, loaded.tokenizer, material, progress=progress)
        return lambda job: _measured(baseline, *job)

    return each_once(
        folder / "effects.jsonl",
        [(site, one) for one in bits for site in sites],
        lambda line: (line["site"], line["bits"]),
        {"site", "bits", "public", "domain", "gap", "changes"},
        begin,
        progress,
        "effects",
        lambda job: f"{job[0]} at {job[1]} bits",
    )


def _measured(baseline: Baseline, site: str, bits: int) -> dict:
    one = effect(baseline, Part(site), Intervention("quantize", float(bits)))
    told = one.to_dict()
    return {
        "site": site,
        "bits": bits,
        **{name: value for name, value in told.items() if name not in ("part", "tasks")},
    }


def _first_order(loaded: Loaded, public: Windows, bits: Sequence[int], progress: Progress) -> dict:
    """The part of every effect on public text that is of first order in the error, window by window."""
    pages = map_weights(loaded.model)
    blocks = walk(loaded.model, public.tokens[:1, :8], pages)
    return first_order(loaded.model, blocks, public.tokens, bits, pages=pages, progress=progress)


# ---- predictors and boards


def _references(told: dict, loaded: Loaded, bits: Sequence[int], seed: int, progress: Progress) -> list[dict]:
    """What rounding does to the geometry of layers of this model, over all of them and over those of a kind."""
    modules, found = site_modules(loaded.model), []
    for done, site in enumerate(told["sites"], 1):
        found.append((site["kind"], reference_values(read_weight(modules[site["name"]]), bits, seed)))
        progress("geometry", done, len(told["sites"]), site["name"])
    kinds = ("all", *dict.fromkeys(kind for kind, _ in found))
    return [
        {
            "bits": one,
            "kind": kind,
            **{
                name: quartiles([values[one][name] for own, values in found if kind in ("all", own)])
                for name in GEOMETRY
            },
        }
        for one in bits
        for kind in kinds
    ]


def _predictors(told: dict, loaded: Loaded) -> dict[str, tuple[str, np.ndarray]]:
    """Every score's value per site, and what anybody would guess first."""
    sites, modules = told["sites"], site_modules(loaded.model)
    norms = [read_weight(modules[site["name"]]).norm().item() for site in sites]
    found = {
        "depth": ("number of the block", np.array([site["block"] for site in sites], float)),
        "size": ("number of weights", np.array([site["shape"][0] * site["shape"][1] for site in sites], float)),
        "norm": ("length of the weights", np.array(norms)),
    }
    for score in told["scores"]:
        values = [site["scores"].get(score["name"], {}).get("value") for site in sites]
        found[score["name"]] = (score["title"], np.array([np.nan if v is None else v for v in values], float))
    return found


def _value(measured: dict | None, sign: float = 1.0) -> float | None:
    return None if measured is None or measured["value"] is None else sign * measured["value"]


def _rest(one: dict) -> tuple[list[float] | None, float | None]:
    """The effect on public text without its first order: window by window, and their mean."""
    slopes, changes = one.get("first_order"), one["changes"]
    if slopes is None:
        return None, None
    rest = [math.nan if change is None else change - slope for change, slope in zip(changes, slopes, strict=True)]
    value = float(np.mean(rest))
    return rest, value if math.isfinite(value) else None


MEASURES = {
    "public": ("rise of the loss on public text", lambda one: one["public"]["value"]),
    "rest": ("rise of the loss on public text beyond its first order in the error", lambda one: _rest(one)[1]),
    "domain": ("rise of the loss on unseen records", lambda one: _value(one["domain"])),
    "gap": ("fall of the gap between members and others", lambda one: _value(one["gap"], -1.0)),
}


def _boards(predictors: dict, found: dict, told: dict, bits: int, seed: int) -> list[dict]:
    """One leaderboard per measure at this bit width."""
    sites, boards = [site["name"] for site in told["sites"]], []
    for measure, (title, read) in MEASURES.items():
        values = [read(found[site, bits]) for site in sites]
        effect_ = np.array([np.nan if value is None else value for value in values], float)
        if measure in ("public", "rest") and np.isfinite(effect_).any():
            effect_[np.isnan(effect_)] = np.nanmax(effect_) + 1  # the model was lost: nothing is worse
        known = {
            name: score
            for name, (_, score) in predictors.items()
            if (np.isfinite(score) & np.isfinite(effect_)).sum() >= FEWEST
        }
        if not known:
            continue
        places = {"blocks": [site["block"] for site in told["sites"]], "kinds": [within(name) for name in sites]}
        rows = leaderboard(known, effect_, **places, seed=seed)
        most = None
        if measure in ("public", "rest"):
            lines = [found[site, bits] for site in sites]
            own = [one["changes"] if measure == "public" else _rest(one)[0] for one in lines]
            parts = np.array(own, float).T  # a lost model's are NaN
            most = ceiling(parts, seed=seed) if len(parts) > 1 and np.isfinite(parts).all() else None
        rows = [asdict(row) for row in rows]
        boards.append({"bits": bits, "measure": measure, "title": title, "ceiling": most, "rows": rows})
    return boards


def sentence(board: dict) -> str:
    """What a board says, no more than its interval allows."""
    best, bits = board["rows"][0], board["bits"]
    if not np.isfinite(best["rho"]):
        return f"{board['title']} at {bits} bits: nothing to foretell, all layers are alike."
    low, high = best["ci"]
    sure = [row["name"] for row in board["rows"] if row["p_holm"] < 0.05]
    guesses = [row for row in board["rows"] if row["name"] in GUESSES]
    beside = f"; of what anybody would guess, {guesses[0]['name']} has {guesses[0]['rho']:+.2f}" if guesses else ""
    return (
        f"{board['title']} at {bits} bits: best foretold by {best['name']}, rank correlation {best['rho']:+.2f} "
        f"({low:+.2f} to {high:+.2f}) over {best['sites']} layers, {best['hits']} of its worst {best['worst']}"
        f"{beside}; {len(sure)} of {len(board['rows'])} predictors say more than block and kind of a layer do."
    )

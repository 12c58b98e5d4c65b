"""What going back to the public base takes of memory and of function, at the size of plain quantization.

    python benchmarks/anchoring.py CURVE OUT --regimes strong extreme --rates 3.25
    python benchmarks/anchoring.py CURVE OUT --points "forgot 4" --strangers 300
    python benchmarks/anchoring.py CURVE OUT --table

CURVE is the folder of `privacy_curve.py`, whose models and records are used. The levers see every second member
(`seen`) and, as --domain, 120 records (or --strangers N) of the generator under another seed, which nobody else sees.
The others (`unseen`) say whether what was taken is memory in general or that of these records alone. With `--given all`
the levers see what the owner of the data has: all members and canaries. The attacked model's non-members are never
seen. All points of a rate have the same size, with embeddings and head on the lattice too. A point is one run of the
library's own `quantize`, with the short calibration of `privacy_curve.py`.

One line a point is added to OUT/points.jsonl; points that are there are skipped. What an aimed anchor measures lies in
OUT/taught-KEY.safetensors, for all points of one model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

import privacy_curve as curve
from geoquant.cli.screen import Lines
from geoquant.data.records import write_records
from geoquant.data.synthetic import synthetic_records
from geoquant.evaluate.perplexity import difference
from geoquant.model.load import load
from geoquant.privacy.audit import audit
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.statistics import auc
from geoquant.report.control import control_sentences, moved_rows
from geoquant.runs import read_json

STRANGERS = 120  # records of --domain
PASSES = 8  # of refinement
POINTS: dict[str, dict] = {
    "plain": {},
    **{f"interpolation {share:g}": {"anchor": round(1 - share, 2), "aim": "everything"} for share in (0.8, 0.6)},
    **{f"aimed {strength:g}": {"anchor": strength, "aim": "memory"} for strength in (0.5, 0.7, 0.85, 1.0)},
    **{f"metric {share:g}": {"anchor": share, "aim": "metric"} for share in (0.5, 0.8)},
    **{f"refined, weight {weight:g}": {"refine": PASSES, "refine_privacy": weight} for weight in (1.0, 10.0)},
    **{
        f"aimed {strength:g}, refined, weight {weight:g}": {
            "anchor": strength,
            "aim": "memory",
            "refine": PASSES,
            "refine_privacy": weight,
        }
        for strength in (0.7, 1.0)
        for weight in (1.0, 10.0)
    },
    **{f"forgot {passes}": {"forget": passes} for passes in (2, 4)},
    **{f"base, taught {passes}": {"anchor": 1.0, "aim": "everything", "forget": passes} for passes in (4, 8)},
    **{
        f"aimed {strength:g}, forgot {passes}": {"anchor": strength, "aim": "memory", "forget": passes}
        for strength in (0.5, 0.7)
        for passes in (2, 4)
    },
}
WORDS = {"half": "the levers saw every second member", "all": "the levers saw all members and canaries"}
SHOWN = ("reference", "loss")


def records(out: Path, given: str, strangers: int) -> dict[str, str]:
    """The files that the levers see."""
    made = curve.made("medical")
    known = {record.text for side in (made.members, made.nonmembers, made.holdout) for record in side}
    # Of what is made the members of its own split are taken.
    others = synthetic_records("medical", max(300, 3 * strangers), seed=1001).members
    fresh = [one for one in others if one.text not in known][:strangers]
    half = made.split.members[::2]
    sides = {"private": half if given == "half" else (*made.members, *made.split.canaries), "domain": fresh}
    ends = {"private": "" if given == "half" else f"-{given}", "domain": "" if strangers == 120 else f"-{strangers}"}
    paths = {name: out / f"{name}{ends[name]}.jsonl" for name in sides}
    for name, side in sides.items():
        write_records(paths[name], side)
    return {name: str(path) for name, path in paths.items()}


def point(place: Path, out: Path, regime: str, rate: float, name: str, given: str, strangers: int, progress) -> dict:
    """Make and measure one point."""
    started = time.perf_counter()
    models, kept = place / "models", place / "measured"
    model = models / "medical" / regime
    public = curve.remembered(kept / "medical-base", "medical", lambda: load(str(models / "base")), progress)
    first = curve.remembered(kept / f"{regime}-original", "medical", lambda: load(str(model)), progress)
    overrides = {"rate": rate}
    if POINTS[name]:
        overrides |= POINTS[name] | {"base": str(models / "base")}
        if overrides.get("aim") in ("memory", "metric") or {"refine", "forget"} & overrides.keys():
            overrides |= records(out, given, strangers)
    run = out / "runs" / f"{regime}-{rate:g}-{given}-{strangers}-{name.replace(',', '').replace(' ', '-')}"
    loaded, size = curve.compressed(run, model, overrides, progress, shared=out)
    told = read_json(run / "report.json", timings=dict)
    found = curve.measure(loaded, "medical", progress)
    del loaded
    shutil.rmtree(run)
    return {
        "regime": regime,
        "rate": rate,
        "point": name,
        "given": given,
        "strangers": strangers,
        "bits_per_weight": size["bits_per_weight"],
        "protection": told["protection"],
        "refinement": told["refinement"],
        **figures(found, first, public, given),
        "timings": told["timings"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def figures(found: curve.Measured, before: curve.Measured, public: curve.Measured, given: str) -> dict:
    """Losses, and every attack on the members that the levers saw and on the others."""
    split = curve.made("medical").split
    scores = curve.membership(split, found, public)
    attacks = {}
    sides = {"seen": slice(0, None, 2), "unseen": slice(1, None, 2)} if given == "half" else {"seen": slice(None)}
    for name, (members, strangers) in scores.items():
        attacks[name] = {}
        for side, part in ((side, members[own]) for side, own in sides.items()):
            attacks[name][side] = {
                "auc": auc(part, strangers),
                "ci": list(delong_interval(part, strangers)),
            }
    now = audit("point", found.scores, public.scores, split)
    return {
        "perplexity": found.public.perplexity,
        "nll": found.public.nll,
        "se": found.public.se,
        "domain_nll": found.domain.nll,
        "domain_se": found.domain.se,
        "delta_public": difference(before.public, found.public),
        "delta_domain": difference(before.domain, found.domain),
        "attacks": attacks,
        "extraction": {part.kind: curve.leaked(part) for _, part in now.extraction},
        "continued": {str(part.prefix): curve.leaked(part.found) for _, part in now.suffixes},
        "exposure": curve.secrets(now, found, split),
    }


def show(rows: list[dict]) -> None:
    """Markdown, a table for each regime and rate."""
    keys = ("regime", "rate", "given", "strangers")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in keys) == key]
        print(f"\n**{key[0]}**, {key[1]:g} bits, {WORDS[key[2]]} and {key[3]} of --domain:\n")
        heads = ["point", "bits", "perplexity", "domain loss"]
        sides = list(chosen[0]["attacks"]["loss"])
        heads += [f"{attack} AUC, {side}" for attack in SHOWN for side in sides]
        heads += ["marked spans extracted", "records continued", "exposure, bits"]
        print("| " + " | ".join(heads) + " |")
        print("|" + "---|" * len(heads))
        for row in chosen:
            cells = [row["point"], f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}"]
            cells.append(f"{row['domain_nll']:.3f} ± {row['domain_se']:.3f}")
            for attack in SHOWN:
                for side in sides:
                    one = row["attacks"][attack][side]
                    cells.append(f"{one['auc']:.3f} ({one['ci'][0]:.2f}–{one['ci'][1]:.2f})")
            spans = row["extraction"].get("all") or next(iter(row["extraction"].values()))
            cells.append(f"{spans['extracted']} of {spans['spans']}")
            longest = row["continued"].get("32")
            cells.append(f"{longest['extracted']} of {longest['spans']}" if longest else "–")
            told = row["exposure"]
            cells.append(f"{told['mean']:.1f} ± {told['se']:.1f}" if told else "–")
            print("| " + " | ".join(cells) + " |")
        for row in chosen:
            if not (told := control_sentences({**row, "privacy": None})):
                continue
            moved = ", ".join(f"{name} {share:.0%}" for name, share in moved_rows(row))
            print(f"\n{row['point']}: {' '.join(told)}{f' Moved: {moved}.' if moved else ''}")


def rows_of(path: Path) -> list[dict]:
    """The points that are there; the first ones were made when there was no choice of records."""
    return [{"given": "half", "strangers": STRANGERS, **row} for row in curve.read_rows(path)]


def main() -> None:
    """Make points, or show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regimes", nargs="*", default=["mild", "strong", "extreme"])
    parser.add_argument("--rates", nargs="*", type=float, default=[3.25, 4.25])
    parser.add_argument("--points", nargs="*", default=list(POINTS), help=", ".join(POINTS))
    parser.add_argument("--given", choices=tuple(WORDS), default="half", help="which records the levers see")
    parser.add_argument("--strangers", type=int, default=STRANGERS, help="records of --domain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = arguments.out / "points.jsonl"
    if arguments.table:
        show(rows_of(path))
        return
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen = arguments.given, arguments.strangers
    done = {(row["regime"], row["rate"], row["point"], row["given"], row["strangers"]) for row in rows_of(path)}
    for regime in arguments.regimes:
        for rate in arguments.rates:
            for name in arguments.points:
                if (regime, rate, name, *seen) not in done:
                    told = Lines(sys.stderr)
                    row = point(arguments.curve, arguments.out, regime, rate, name, *seen, told)
                    curve.add_row(path, row)
                    print(regime, rate, name, f"perplexity {row['perplexity']:.2f}", f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

"""Frontiers of SmolLM2 in three regimes of memorisation: what levers take and cost beside the baselines, at equal size.

    python benchmarks/regimes.py CURVE OUT --regime strong --points "lattice 3.25" "forget, lattice 3.25"
    python benchmarks/regimes.py CURVE OUT --regime strong                  # all points; goes on where it was stopped
    python benchmarks/regimes.py CURVE OUT --table                          # what is there so far, as markdown

CURVE is the folder of `privacy_curve.py`, whose models, records, public text and short calibration are used. The levers
see what the owner of the data has, all members and planted canaries (`--private`), and as `--domain` 480 records of the
generator under another seed, which nobody else sees; the attacks' non-members and the withheld canaries no lever sees.

OUT/records/   those files; OUT/REGIME/: `geoquant frontier`, its page and all it measured
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import privacy_curve as curve
from geoquant.charting import frontier
from geoquant.cli.screen import Lines
from geoquant.data.folder import write_folder
from geoquant.data.records import write_records
from geoquant.data.synthetic import synthetic_records
from geoquant.finetuning import REGIMES
from geoquant.plan.points import INPUTS, ORIGINAL, Change, Point
from geoquant.runs import read_json

STRANGERS = 480  # records of --domain
SHORT = {name: curve.CALIBRATION[name] for name in ("target", "gradient_share")}
FORGET = {"forget": 4}
AIMED = {"anchor": 0.7, "aim": "memory"}
GUARANTEED = {"rate": 4.25, "delta": 1e-5, "radius": 0.003}


def lattice(name: str, family: str, rate: float, needs: tuple[str, ...] = (), **options) -> Point:
    """A point on the lattice, all weights coded."""
    change = Change("noise", options.pop("noise")) if "noise" in options else None
    return Point(f"{name}lattice {rate:g}", family, {"rate": rate, **SHORT, **options}, change, needs=needs)


POINTS = (
    lattice("", "lattice", 3.25),
    lattice("forget, ", "shape", 3.25, INPUTS, **FORGET),
    lattice("", "lattice", 4.25),
    lattice("forget, ", "shape", 4.25, INPUTS, **FORGET),
    lattice("interpolate 0.6, ", "interpolation", 3.25, ("base",), anchor=0.4, aim="everything"),
    lattice("interpolate 0.3, ", "interpolation", 3.25, ("base",), anchor=0.7, aim="everything"),
    lattice("noise 0.5, ", "noise", 3.25, noise=0.5),
    lattice("", "lattice", 2.5),
    lattice("anchor 0.7 by memory, ", "anchor", 3.25, INPUTS, **AIMED),
    lattice("anchor 0.7 by memory, forget, ", "together", 3.25, INPUTS, **AIMED, **FORGET),
    *(Point(f"noise {steps:g}", "noise", {}, Change("noise", steps), quantize=False) for steps in (0.5, 1.2, 2.0)),
    Point("rtn 4 bits", "rounding", {"grid": "box", "bits": 4, "method": "rtn"}),
    *(
        Point(f"epsilon {epsilon:g}, lattice 4.25", "guarantee", {**GUARANTEED, "epsilon": epsilon}, needs=("base",))
        for epsilon in (8.0, 2.0, 1.0)
    ),
)


def records(out: Path) -> dict[str, str]:
    """The files that audits and levers read; made once."""
    made, folder = curve.made("medical"), out / "records"
    if not folder.exists():
        write_folder(made, folder)
    known = {record.text for side in (made.members, made.nonmembers, made.holdout) for record in side}
    others = synthetic_records("medical", 3 * STRANGERS, seed=1001).members
    fresh = [one for one in others if one.text not in known][:STRANGERS]
    for name, side in {"private": (*made.members, *made.split.canaries), "domain": fresh}.items():
        write_records(folder / f"{name}.jsonl", side)
    names = ("members", "nonmembers", "canaries", "private", "domain")
    return {name: str(folder / f"{name}.jsonl") for name in names}


def chart(place: Path, out: Path, regime: str, names: list[str] | None, jobs: int, progress) -> dict:
    """The frontier of a regime: the points that are asked for and those that are there."""
    folder, files = out / regime, records(out)
    kept = [point for point in POINTS if not names or point.name in names or there(folder, point.name)]
    tokens, windows = curve.PUBLIC
    return frontier(
        place / "models" / "medical" / regime,
        folder,
        base=place / "models" / "base",
        private=files.pop("private"),
        domain=files.pop("domain"),
        points=[Point(ORIGINAL, "original", quantize=False), *kept],
        jobs=jobs,
        options={**files, "windows": curve.CALIBRATION["windows"], "window": tokens, "evaluation_windows": windows},
        progress=progress,
        command=f"benchmarks/regimes.py --regime {regime}",
    )


def there(folder: Path, name: str) -> bool:
    return (folder / "measured" / f"{name}.json").exists()


def show(out: Path) -> None:
    """A table for each regime that has a frontier."""
    for regime in (one.name for one in REGIMES):
        if not (path := out / regime / "frontier.json").exists():
            continue
        print(f"\n**{regime.capitalize()}**\n")
        for row in read_json(path, rows=list)["rows"]:
            print(row["name"], row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("curve", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regime", nargs="+", default=[one.name for one in REGIMES], dest="regimes")
    parser.add_argument("--points", nargs="+", choices=[point.name for point in POINTS])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        for regime in asked.regimes:
            chart(asked.curve, asked.out, regime, asked.points, asked.jobs, Lines(sys.stderr))
    show(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

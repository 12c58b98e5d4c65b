"""Do the audit's error rates hold? No model is needed: scores are drawn, records are synthetic.

    python benchmarks/audit.py [--draws 1000] [--splits 100]

Prints how often 95% intervals of the AUC hold the truth, how often the paired test sees a difference where there is
none, how often the gate refuses clean splits and notices planted differences, and CPU seconds.
"""

from __future__ import annotations

import argparse
import random
import re
import time

import numpy as np
from scipy.stats import norm

from geoquant.data.private import make_records
from geoquant.data.records import Record
from geoquant.privacy.blind import blind_test
from geoquant.privacy.delong import delong_interval, paired_difference
from geoquant.privacy.duplicates import near_duplicates
from geoquant.privacy.statistics import auc_interval

SIZES = (40, 200)  # records of a side
AUCS = (0.5, 0.75, 0.95, 0.99)


def drawn(rng: np.random.Generator, area: float, n: int, alike: float = 0.0):
    """Normal scores of n + n records under two models of AUC `area`; `alike` is their correlation."""
    sides = []
    for mean in (norm.ppf(area) * np.sqrt(2), 0.0):
        common = rng.normal(0, np.sqrt(alike), n)
        sides.append([mean + common + rng.normal(0, np.sqrt(1 - alike), n) for _ in range(2)])
    return tuple(zip(*sides, strict=True))


def intervals(draws: int) -> None:
    """Coverage of both intervals, and false alarms of the paired test."""
    print("| AUC | records a side | DeLong holds it | bootstrap holds it | paired test below 0.05 |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for area in AUCS:
        for n in SIZES:
            delong = bootstrap = alarms = 0
            for trial in range(draws):
                first, second = drawn(rng, area, n, alike=0.8)
                low, high = delong_interval(*first)
                delong += low <= area <= high
                if trial < draws // 4:  # slower
                    low, high = auc_interval(*first, resamples=500, seed=trial)
                    bootstrap += low <= area <= high
                alarms += paired_difference(first, second).p < 0.05
            rates = (delong / draws, bootstrap / (draws // 4), alarms / draws)
            print(f"| {area} | {n} | " + " | ".join(f"{100 * rate:.1f}%" for rate in rates) + " |", flush=True)


def years(records: list[Record], low: int, high: int, rng: random.Random) -> list[Record]:
    """A year after each date."""
    return [
        Record(re.sub(r"on (\w+ \d+)", lambda m: f"on {m[1]}, {rng.randrange(low, high)}", r.text)) for r in records
    ]


def planted(name: str, members: list[Record], nonmembers: list[Record], rng: random.Random):
    """Two sides with a known difference."""
    if name == "dates 2015-2019 and 2018-2022":
        return years(members, 2015, 2020, rng), years(nonmembers, 2018, 2023, rng)
    if name == "one verb in a sixth of one side":
        return members, [Record(r.text.replace("phoned", "rang").replace("called", "rang")) for r in nonmembers]
    if name == "up to 8 characters cut off one side":
        return members, [Record(r.text[: len(r.text) - rng.randrange(9)]) for r in nonmembers]
    return members, nonmembers


def gate(splits: int) -> None:
    """How often the gate fires, for each planted difference."""
    print("\n| difference | records a side | refused at 1% | mean blind AUC |\n|---|---|---|---|")
    names = ("none", "dates 2015-2019 and 2018-2022", "one verb in a sixth of one side")
    for name in (*names, "up to 8 characters cut off one side"):
        for n in (50, 150):
            count = splits if name == "none" else max(splits // 10, 1)
            found = []
            for seed in range(count):
                rng = random.Random(seed)
                pool = make_records(2 * n, seed)
                rng.shuffle(pool)
                found.append(blind_test(*planted(name, pool[:n], pool[n:], rng), seed=seed))
            refused = sum(not result.valid for result in found)
            print(f"| {name} | {n} | {refused} of {count} | {np.mean([r.auc for r in found]):.2f} |", flush=True)


def seconds() -> None:
    """CPU seconds of both checks, and how alike records of different people are."""
    print("\n| records a side | gate, CPU s | near-duplicates, CPU s | pairs at 0.7 | at 0.55 |\n|---|---|---|---|---|")
    for n in (100, 1000, 3000):
        pool = make_records(2 * n, 0)
        random.Random(1).shuffle(pool)
        begin = time.process_time()
        blind_test(pool[:n], pool[n:])
        middle = time.process_time()
        pairs = near_duplicates(pool[:n], pool[n:])
        end = time.process_time()
        alike = near_duplicates(pool[:n], pool[n:], 0.55)
        cells = f"{middle - begin:.1f} | {end - middle:.1f} | {len(pairs)} | {len(alike)}"
        print(f"| {n} | {cells} |", flush=True)


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--splits", type=int, default=100)
    arguments = parser.parse_args()
    intervals(arguments.draws)
    gate(arguments.splits)
    seconds()


if __name__ == "__main__":
    main()

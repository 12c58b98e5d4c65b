"""What is each choice worth? One factor at a time around the default, and two interactions, on paired calibration sets.

    python benchmarks/factorial.py MODEL --calibration VALID.txt --test TEST.txt --rows rows.jsonl --sets 2 \\
        --base rate=2.5 --base bits=3

A full factorial (3 metrics, 3 kinds of runtime inputs, 2 targets, 4 orders, 3 dampings: 216 arms for each size) would
take days. This is a main-effects design: the default, every other level of every factor alone, and the pairs of levels
of the two interactions that theory expects, metric x target and sequential x target. Arms that do not exist are left
out: the lattice has one metric and no groups, and full-precision inputs leave nothing for the target to correct.

Every run is one JSON line in --rows; what is there already is not run again, so the benchmark can be stopped at any
time, and `--sets 4 --factor target` may follow `--sets 2`. The table is made of all lines in the file; an arm is
compared with the default on the sets that both were run on, on the test text and `elsewhere`: on Python's language
reference, which is neither the calibration text nor like it. Printed at the end, or at once with `--table`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from paired import against, changes, run_arm

# Levels besides the default, most decisive factors first.
FACTORS = {
    "target": ("weights",),
    "sequential": ("block", "off"),
    "metric": ("clipped", "plain"),
    "order": ("activation", "natural", "min-pivot"),
    "damping": ("0.01", "0.05"),
}
INTERACTIONS = (("metric", "target"), ("sequential", "target"))


def arms(base: str, factors: list[str]) -> list[str]:
    """The default and everything that is compared with it."""
    alone = [f"{base},{factor}={level}" for factor in factors for level in FACTORS[factor]]
    pairs = [
        f"{base},{one}={first},{other}={second}"
        for one, other in INTERACTIONS
        if one in factors and other in factors
        for first, second in product(FACTORS[one], FACTORS[other])
    ]
    return [base, *(arm for arm in alone + pairs if exists(arm))]


def exists(arm: str) -> bool:
    """Whether the program accepts the arm, and it is not another name of the default."""
    from geoquant.errors import UserError
    from geoquant.plan.uniform import uniform_plan
    from geoquant.recipe import checked

    recipe = checked({"model": "-", **changes(arm)})
    try:
        uniform_plan((), recipe)
    except UserError:
        return False
    if recipe.sequential == "off" and recipe.target == "weights":  # then both targets are the same
        return False
    return not (recipe.grid == "lattice" and recipe.order == "activation")  # the lattice's default


def jobs(bases: list[str], factors: list[str], sets: int) -> Iterator[tuple[int, str]]:
    """(set, arm), so that after any number of them those done are pairs: an arm on all sets before the next arm."""
    for base in bases:
        for arm in arms(base, factors):
            yield from ((number, arm) for number in range(sets))


def table(rows: list[dict], bases: list[str]) -> str:
    """Markdown: each measured arm against the default of its base."""
    head = ["settings", "bits per weight", "perplexity by set", "against the default, %", "elsewhere, %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    measured = {row["arm"] for row in rows}
    for base in bases:
        for arm in (arm for arm in arms(base, list(FACTORS)) if arm in measured):
            mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["set"])
            worth, elsewhere = against(rows, arm, base), against(rows, arm, base, "elsewhere")
            each = ", ".join(f"{row['perplexity']:.2f}" for row in mine)
            bits = statistics.mean(row["bits"] for row in mine)
            name = f"**{base}**" if arm == base else arm.removeprefix(f"{base},").replace(",", ", ")
            lines.append(f"| {name} | {bits:.3f} | {each} | {worth} | {elsewhere} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what --rows lacks, one process at a time; print each row and the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, read and added to")
    parser.add_argument("--base", action="append", metavar="NAME=VALUE,...", help="default rate=2.5 and bits=3")
    parser.add_argument("--factor", action="append", choices=list(FACTORS), help="default all")
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    bases = arguments.base or ["rate=2.5", "bits=3"]
    stored = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    rows = [json.loads(line) for line in stored]
    done = {(row["set"], row["arm"]) for row in rows}
    for number, arm in jobs(bases, arguments.factor or list(FACTORS), arguments.sets):
        if arguments.table or (number, arm) in done:
            continue
        rows.append(run_arm(arguments.model, arguments.calibration, arguments.test, number, arm))
        with arguments.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows, bases))


if __name__ == "__main__":
    main()

"""What is each choice worth, alone and together? Two-level factorial designs, and single changes.

    python benchmarks/factorial.py MODEL --calibration VALID.txt --test TEST.txt --rows ROWS.jsonl --design factorial
    python benchmarks/factorial.py MODEL --calibration VALID.txt --test TEST.txt --rows ROWS.jsonl --design single

`factorial` runs two levels of each of target, metric, order and damping: the default and its rival. With 3-bit codes
these are the combinations with an even number of rivals, 8 of 16; on the lattice at 3 bits, which has one metric, all
8. Every effect is then measured by *all* runs: half of them have the one level, half the other, with everything else in
balance. In the half, pairs of choices share an effect with the other pair, and both are named. The kind of runtime
inputs, `sequential`, is not part of it: its rivals leave nothing to a target (see `Recipe.follows_drift`).

Nothing is run twice, so the error of an effect is Lenth's: 1.5 times the median of the absolute effects that are not
themselves large, on a third of as many degrees of freedom (Technometrics 31, 1989). `single` changes one choice at a
time, to every other level, on as many calibration sets as asked for; `sequential` beside the target `weights`, and once
with output targets for every stage of a block.

Every run is one JSON line in --rows; what is there already is not run again, so the benchmark can be stopped at any
time. Texts: the test text, and `elsewhere`: Python's language reference, which is neither the calibration text nor
like it. Printed at the end, or at once with `--table`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from itertools import combinations, product
from pathlib import Path

from scipy.stats import t

from paired import against, changes, run_arm

# Levels besides the default, the first of which is the rival in the factorial design.
FACTORS = {
    "target": ("weights",),
    "metric": ("clipped", "plain"),
    "order": ("activation", "natural", "min-pivot"),
    "damping": ("0.01", "0.05"),
}
SEQUENTIAL = (*(f"target=weights,sequential={kind}" for kind in ("block", "off")), "sequential=block,follow=true")
BASES = ("bits=3", "rate=3,embeddings=false,method=lattice")


def levels(base: str) -> dict[str, tuple[str, ...]]:
    """The choices that there are with a base: the lattice has one metric, and no groups to be aware of."""
    if not base.startswith("rate"):
        return FACTORS
    return {name: FACTORS[name] for name in FACTORS if name != "metric"} | {"order": ("natural", "min-pivot")}


def arm(base: str, changed: dict[str, str]) -> str:
    """The base with some of its settings changed, as the benchmark of pairs writes it."""
    return ",".join([base, *(f"{name}={level}" for name, level in changed.items())])


def singles(base: str, factors: list[str] | None = None) -> list[str]:
    """The default and every other level of every choice, or of some of them, alone."""
    known = {name: others for name, others in levels(base).items() if factors is None or name in factors}
    found = [base, *(arm(base, {name: level}) for name, others in known.items() for level in others)]
    if factors is None or "sequential" in factors:
        found += [arm(base, {"target": "weights"}), *(f"{base},{change}" for change in SEQUENTIAL)]
    return list(dict.fromkeys(found))


def design(base: str) -> list[tuple[frozenset[str], str]]:
    """The choices that are changed in a run, and the run: all combinations of three choices; of four, those where an
    even number is changed."""
    rivals = {name: others[0] for name, others in levels(base).items()}
    counts = range(0, len(rivals) + 1, 2 if len(rivals) > 3 else 1)
    subsets = (frozenset(s) for count in counts for s in combinations(rivals, count))
    return [(subset, arm(base, {n: rivals[n] for n in rivals if n in subset})) for subset in subsets]


def effects(base: str, measured: dict[str, float]) -> list[tuple[str, float]]:
    """What each rival, and each pair of them, does to the logarithm of a perplexity, in %: the mean of the runs with it
    less the mean of those without; for a pair, half of what one does more when the other is there.

    measured: logarithms by arm. Nothing while runs are missing.
    """
    runs = design(base)
    if any(name not in measured for _, name in runs):
        return []
    names, seen, found = list(levels(base)), set(), []
    for one in [frozenset(s) for size in (1, 2) for s in combinations(names, size)]:
        if one in seen:
            continue
        # In a half, what is left of all choices is the same contrast.
        twin = frozenset(names) - one if len(runs) < 2 ** len(names) else one
        seen |= {one, twin}
        contrast = sum(measured[name] * (-1) ** len(one - subset) for subset, name in runs)
        both = [one, twin] if one != twin and len(twin) <= 2 else [one]
        label = " or ".join(" x ".join(name for name in names if name in part) for part in both)
        found.append((label, 100 * contrast * 2 / len(runs)))
    return found


def lenth(found: list[float]) -> tuple[float, float]:
    """Lenth's pseudo standard error of unreplicated effects, and the margin that one of them exceeds by chance in one
    case of twenty."""
    sizes = [abs(value) for value in found]
    first = 1.5 * statistics.median(sizes)
    error = 1.5 * statistics.median([size for size in sizes if size < 2.5 * first])
    return error, t.ppf(0.975, len(sizes) / 3) * error


def design_table(rows: list[dict], base: str) -> str:
    """Markdown: runs and effects of one design, as far as it was run."""
    mine = [row for row in rows if row["set"] == 0]
    lines = ["| changed | bits per weight | perplexity | elsewhere |", "|---|---|---|---|"]
    by_arm = {row["arm"]: row for row in mine}
    for subset, name in design(base):
        if name in by_arm:
            row, what = by_arm[name], ", ".join(c for c in levels(base) if c in subset) or f"**{base}**"
            lines.append(f"| {what} | {row['bits']:.3f} | {row['perplexity']:.2f} | {row['elsewhere']:.2f} |")
    found = {
        text: effects(base, {name: math.log(row[text]) for name, row in by_arm.items()})
        for text in ("perplexity", "elsewhere")
    }
    if not found["perplexity"]:
        return "\n".join(lines)
    lines += ["", "| effect | on log perplexity, % | elsewhere, % |", "|---|---|---|"]
    for (label, here), (_, there) in zip(found["perplexity"], found["elsewhere"], strict=True):
        lines.append(f"| {label} | {here:+.2f} | {there:+.2f} |")
    cells = [lenth([value for _, value in found[text]]) for text in found]
    lines.append(
        "| *chance (Lenth's error, margin at 5%)* | " + " | ".join(f"{e:.2f}, {m:.2f}" for e, m in cells) + " |"
    )
    return "\n".join(lines)


def single_table(rows: list[dict], bases: list[str]) -> str:
    """Markdown: each measured arm against the default of its base."""
    head = ["settings", "bits per weight", "perplexity by set", "against the default, %", "elsewhere, %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    measured = {row["arm"] for row in rows}
    for base in bases:
        for name in (name for name in singles(base) if name in measured):
            mine = sorted((row for row in rows if row["arm"] == name), key=lambda row: row["set"])
            worth, elsewhere = against(rows, name, base), against(rows, name, base, "elsewhere")
            each = ", ".join(f"{row['perplexity']:.2f}" for row in mine)
            bits = statistics.mean(row["bits"] for row in mine)
            what = f"**{base}**" if name == base else name.removeprefix(f"{base},").replace(",", ", ")
            lines.append(f"| {what} | {bits:.3f} | {each} | {worth} | {elsewhere} |")
    return "\n".join(lines)


def check(arms: list[str]) -> None:
    """Every arm must be a recipe that the program accepts, before days are spent on the others."""
    from geoquant.plan.uniform import check_choices
    from geoquant.recipe import checked

    for name in arms:
        settings = {key: value for key, value in changes(name).items() if key != "follow"}
        check_choices(checked({"model": "-", **settings}))


def main() -> None:
    """Measure what --rows lacks, one process at a time; print each row and the tables of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, read and added to")
    parser.add_argument("--design", choices=("factorial", "single"), default="factorial")
    parser.add_argument("--base", action="append", metavar="NAME=VALUE,...", help=f"default {' and '.join(BASES)}")
    parser.add_argument(
        "--factor", action="append", choices=[*FACTORS, "sequential"], help="single changes only; default all"
    )
    parser.add_argument("--sets", type=int, default=1, help="calibration sets of the single changes")
    parser.add_argument("--gradients", metavar="FOLDER", help="where gradient passes wait for runs that need the same")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    bases = arguments.base or list(BASES)
    if arguments.design == "factorial":
        wanted, sets = [name for base in bases for _, name in design(base)], 1
    else:
        wanted, sets = [name for base in bases for name in singles(base, arguments.factor)], arguments.sets
    check(wanted)
    given = arguments.model, arguments.calibration, arguments.test
    stored = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    rows = [json.loads(line) for line in stored]
    done = {(row["set"], row["arm"]) for row in rows}
    # An arm on all sets before the next arm: after any number of them those done are pairs.
    for name, number in product([] if arguments.table else wanted, range(sets)):
        if (number, name) in done:
            continue
        rows.append(run_arm(*given, number, name, arguments.gradients))
        with arguments.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    if arguments.design == "single":
        print(single_table(rows, bases))
    else:
        print("\n\n".join(design_table(rows, base) for base in bases))


if __name__ == "__main__":
    main()

"""Where do a model's outliers come from, and what does it cost to see it?

    python benchmarks/origins.py MODEL --text TEST.txt --out origins.json

Prints a table with one row per block and the findings; `--out` keeps everything. Without a text: the built-in one.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from geoquant.data.text import read_text, windows
from geoquant.measure import builtin_tail
from geoquant.model.load import load
from geoquant.outliers.origin import Origins, origins


def table(found: Origins) -> list[str]:
    """Of every block: sinks, and what it leaves in the residual stream."""
    lines = [
        "| block | on the sink, mean of heads | most | heads above half | value ratio | logit range, normal logits | "
        "largest over median | position, dimension | turns massive, other tokens to |",
        "|---" * 9 + "|",
    ]
    sinks, residuals = found.sinks, found.residuals
    for index, mass in enumerate(sinks.mass):
        cells = ["not seen"] * 5
        if mass is not None:
            ratio = sinks.value_ratio[index]
            cells = [
                f"{mean(mass):.2f}",
                f"{max(mass):.2f}",
                f"{sum(x > 0.5 for x in mass)}/{len(mass)}",
                "not seen" if ratio is None else f"{mean(ratio):.2f}",
                f"{mean(sinks.logit_range[index]):.1f}, {mean(sinks.gaussian_range[index]):.1f}",
            ]
        turned = residuals.massive_cosine[index]
        cells += [
            f"{residuals.largest[index + 1] / residuals.typical[index + 1]:,.0f}",
            f"{residuals.position[index + 1]}, {residuals.dimension[index + 1]}",
            f"{'none' if turned is None else f'{turned:.4f}'}, {residuals.ordinary_cosine[index]:.3f}",
        ]
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return lines


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Print the table, the findings and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    length, count = arguments.length, arguments.windows
    if arguments.text:
        text = windows(loaded.tokenizer, read_text(arguments.text), length=length, count=count, source="text")
    else:
        text = builtin_tail(loaded.tokenizer, length, count)
    wall, spent = time.perf_counter(), time.process_time()
    found = origins(loaded.model, text.tokens)
    wall, spent = time.perf_counter() - wall, time.process_time() - spent
    print(*table(found), "", *(f"- {line}" for line in (*found.findings(), *found.notes)), sep="\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{count} windows of {length} tokens: {spent:.0f} CPU seconds, {wall:.0f} s, {peak:.1f} GiB at most")
    if arguments.out:
        arguments.out.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

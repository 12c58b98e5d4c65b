"""Why scores lose sight of fine rounding: the part of each layer's effect that is of first order in its error.

    python benchmarks/first_order.py MODEL ANALYSIS BENCH

The loss on a text changes by `<g, delta> + 1/2 delta^T H delta + ...`, g its gradient and delta the error of rounding.
A trained model has g = 0 on what it learned, not on a text; the first term has either sign, belongs to the text, and
falls with the error while the second falls with its square. For every bit width of BENCH (geoquant bench geometry):
how effects on public text are ordered by <g, delta> on that same text, by <g, delta> on other windows of it, by the
scores of second order in ANALYSIS; and how these order what is left of the effect when <g, delta> is taken away.
Spearman's correlations with bootstrap intervals over layers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from geoquant.data.text import read_text, windows
from geoquant.measure import builtin_ends
from geoquant.model.load import load
from geoquant.model.walk import walk
from geoquant.outliers.first_order import first_order
from geoquant.outliers.leaderboard import ceiling, leaderboard

SECOND = ("kronecker_row", "fisher", "dsm", "hop_row_weighted", "hop_row")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("analysis", type=Path)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--text", help="the public text of BENCH, if it was given one")
    options = parser.parse_args()
    told = json.loads((options.analysis / "analysis.json").read_text(encoding="utf-8"))
    found = json.loads((options.bench / "bench.json").read_text(encoding="utf-8"))
    text = found["texts"]["public"]
    loaded = load(options.model, dtype=torch.float32)
    length, count = text["window"], text["windows"]
    if options.text is None:
        other, own = builtin_ends(loaded.tokenizer, length, count, count)
    else:
        both = windows(loaded.tokenizer, read_text(options.text), length=length, count=2 * count)
        own, other = (replace(both, tokens=tokens) for tokens in both.tokens.split(count))
    if own.sha256 != text["sha256"]:
        raise SystemExit(f"{options.bench} was measured on another text: give it with --text")
    sites = {site["name"]: site["scores"] for site in told["sites"]}
    blocks, widths = walk(loaded.model, own.tokens[:1, :8]), found["settings"]["bits"]
    slopes = [first_order(loaded.model, blocks, one.tokens, widths) for one in (own, other)]
    for bits in widths:
        effects = {line["site"]: line for line in found["effects"] if line["bits"] == bits}
        measured = np.array([line["public"]["value"] for line in effects.values()])
        here, there = (np.array([one[site, bits] for site in effects]).mean(1) for one in slopes)
        seconds = {name: np.array([sites[site][name]["value"] for site in effects]) for name in SECOND}
        rest = measured - here
        parts = np.array([line["changes"] for line in effects.values()]).T
        print(
            f"{bits} bits, {len(effects)} layers: effects {np.median(np.abs(measured)):.2g} nats (median size), first "
            f"order {np.median(np.abs(here)):.2g}, the rest {np.median(np.abs(rest)):.2g}; {np.mean(measured < 0):.0%} "
            f"of layers gain; a second measurement: {ceiling(parts):.2f}"
        )
        board = leaderboard({"<g, delta>, this text": here, "<g, delta>, another": there, **seconds}, measured)
        left = {row.name: row for row in leaderboard(seconds, rest)}
        for row in board:
            after = f", the rest {said(left[row.name])}" if row.name in left else ""
            print(f"  {row.name}: {said(row)}{after}")


def said(row) -> str:
    """A correlation and its interval."""
    return f"{row.rho:+.2f} ({row.ci[0]:+.2f} to {row.ci[1]:+.2f})"


if __name__ == "__main__":
    main()

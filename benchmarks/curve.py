"""The picture of bits against perplexity: ours and the peers'.

    python benchmarks/curve.py docs/curve.jsonl --full 25.61 --out docs/curve.svg

Reads JSON lines with `tool`, `bits_per_weight` and `perplexity`: rows of benchmarks/figures.py and benchmarks/peers.py,
to which `tool` was added. Rows of one tool are joined.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

STYLES = {  # the first tools are ours
    "GeoQuant, lattice": ("#0b6e4f", "o", "-"),
    "GeoQuant, box": ("#86b8a5", "s", "--"),
    "GPTQModel": ("#b5541c", "^", ":"),
    "llm-compressor": ("#8a5a9e", "v", ":"),
}


def draw(rows: list[dict], full: float, out: Path) -> None:
    """Write the picture as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "geoquant", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for tool, (color, marker, line) in STYLES.items():
        points = sorted((row["bits_per_weight"], row["perplexity"]) for row in rows if row["tool"] == tool)
        if points:
            axes.plot(*zip(*points), color=color, marker=marker, linestyle=line, label=tool)
    axes.axhline(full, color="#777777", linewidth=1, linestyle="--")
    axes.annotate(
        f"full precision, {full:.1f}",
        (1.0, full),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top",
        xytext=(-4, -3),
        textcoords="offset points",
        color="#555555",
    )
    axes.set_yscale("log")
    ticks = [25, 30, 40, 50, 60, 80]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(24, 90)
    axes.set_xlabel("bits per weight of the linear layers, as stored")
    axes.set_ylabel("perplexity (WikiText-2)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Read the rows, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--full", type=float, required=True, help="perplexity at full precision")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    draw(rows, arguments.full, arguments.out)


if __name__ == "__main__":
    main()

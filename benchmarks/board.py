"""The leaderboards of a finished `geoquant bench geometry` as Markdown tables, and what rounding did to the attack.

python benchmarks/board.py BENCH [--most 12]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scipy.stats import norm


def main() -> None:
    """Print every board, the best predictors first, then the worst one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--most", type=int, default=100)
    options = parser.parse_args()
    found = json.loads((options.bench / "bench.json").read_text(encoding="utf-8"))
    for board in found["boards"]:
        rows, ceiling = board["rows"], board["ceiling"]
        sure = sum(row["p_holm"] < 0.05 for row in rows)
        title = board["title"][0].upper() + board["title"][1:]
        print(f"{title} at {board['bits']} bits, {rows[0]['sites']} layers;", end=" ")
        print(f"{sure} of {len(rows)} predictors beyond block and kind;", end=" ")
        print("no ceiling" if ceiling is None else f"a second measurement: {ceiling:.2f}\n")
        beside = f"| beyond block and kind | p (Holm) | of the worst {rows[0]['worst']} |"
        print(f"| predictor | rank correlation | 95% interval {beside}")
        print("|---|---|---|---|---|---|")
        for row in rows[: options.most]:
            low, high = row["ci"]
            partial = "none" if row["partial"] is None else f"{row['partial']:+.2f}"
            p = "< 0.02" if row["p_holm"] < 0.02 else f"{row['p_holm']:.2f}"
            print(
                f"| `{row['name']}` | {row['rho']:+.2f} | {low:+.2f} to {high:+.2f} | {partial} | {p} | {row['hits']} |"
            )
        print()
    for bits in found["settings"]["bits"]:
        gaps = [one["gap"] for one in found["effects"] if one["bits"] == bits and one["gap"]]
        gaps = [one for one in gaps if one["value"] is not None and one["se"]]
        if not gaps:
            continue
        limit = norm.isf(0.025 / len(gaps))
        sure = sum(abs(one["value"]) > limit * one["se"] for one in gaps)
        values = [one["value"] for one in gaps]
        print(f"Gap between members and others at {bits} bits: {gaps[0]['before']:.3f} nats before;", end=" ")
        print(
            f"it changes by {min(values):+.4f} to {max(values):+.4f}, in {sure} of {len(gaps)} layers by more than",
            end=" ",
        )
        print(f"{limit:.1f} standard errors (5% for all together).")


if __name__ == "__main__":
    main()

"""Does a metric that changes from one part of a text to another foretell what rounding its layer does?

    python benchmarks/stability.py MODEL --bench BENCH --text VALID.txt

The scores `instability` and `condition_variance` (the published stability index, turned over) of every site, by forward
passes alone, ranked against the rises of the loss in a finished `geoquant bench geometry` of the model, whose text must
be another. As in `analyze`: 4 parts of 8 windows of 512 tokens; as published: 10 sets of 100 tokens. Printed too: how
far the sites lie above their null, and the rank correlation of the two and of one score by both cuts. Three kinds of
sites share one input, and with it the score, so that intervals over sites are too narrow for either.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from geoquant.data.text import read_text, windows
from geoquant.model.load import load
from geoquant.model.walk import site_modules
from geoquant.observe.stream import hooks
from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.leaderboard import leaderboard
from geoquant.outliers.scores import SCORES
from geoquant.outliers.statistics import metrics, summarise, total

NAMES = ("instability", "condition_variance")
CUTS = {"4 parts": (4, None), "10 sets of 100": (10, 100)}


@torch.no_grad()
def inputs(model, tokens: torch.Tensor, most: int = 128) -> dict[str, torch.Tensor]:
    """What at most `most` evenly spaced inputs of every site see, window after window."""
    kept = defaultdict(list)

    def keep(site: str):
        def see(_, args: tuple) -> None:
            x = args[0].flatten(0, -2)
            places = torch.linspace(0, x.shape[1] - 1, min(most, x.shape[1])).round().long()
            kept[site].append(x[:, places].float())

        return see

    with hooks([module.register_forward_pre_hook(keep(site)) for site, module in site_modules(model).items()]):
        for window in tokens:
            model.base_model(window[None], use_cache=False)
    return {site: torch.cat(parts) for site, parts in kept.items()}


def values(x: torch.Tensor, parts: int, length: int | None, generator: torch.Generator) -> dict[str, tuple]:
    """Both scores and their nulls. A part is every `parts`-th window, or a run of `length` tokens."""
    if length is None:
        rows = [torch.cat(x.chunk(2 * parts)[place::parts]) for place in range(parts)]
    else:
        rows = [x[start : start + length] for start in torch.linspace(0, len(x) - length, parts).long().tolist()]
    found = [summarise(part, torch.ones(len(part), 1), 1.0) for part in rows]
    weight = torch.zeros(1, x.shape[1])
    context = SiteContext("", "", weight, weight, total(found), public_metrics=metrics(found))
    null = null_context(context, generator)
    return {name: (SCORES[name].compute(context).item(), SCORES[name].compute(null).item()) for name in NAMES}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--text", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(args.model, dtype=torch.float32)
    text = windows(loaded.tokenizer, read_text(args.text), length=512, count=8)
    told = json.loads((args.bench / "bench.json").read_text())
    seen = inputs(loaded.model, text.tokens)
    generator = torch.Generator().manual_seed(0)
    found = {cut: {site: values(x, *sizes, generator) for site, x in seen.items()} for cut, sizes in CUTS.items()}
    predictors = {}
    for cut, sites in found.items():
        for name in NAMES:
            own, null = (np.array([one[name][place] for one in sites.values()]) for place in (0, 1))
            predictors[f"{name}, {cut}"] = own
            low, middle, high = np.quantile(own, [0, 0.5, 1])
            print(
                f"{name}, {cut}: {low:.3g} to {high:.3g}, median {middle:.3g}; null's median {np.median(null):.3g}; "
                f"above it at {(own > null).sum()} of {len(own)} sites"
            )
    for one, other in (("4 parts", "4 parts"), ("10 sets of 100", "10 sets of 100")):
        pair = predictors[f"{NAMES[0]}, {one}"], predictors[f"{NAMES[1]}, {other}"]
        print(f"the two over sites, {one}: rank correlation {spearmanr(*pair).statistic:+.2f}")
    for name in NAMES:
        pair = [predictors[f"{name}, {cut}"] for cut in CUTS]
        print(f"{name} by both cuts: rank correlation {spearmanr(*pair).statistic:+.2f}")
    for bits in told["settings"]["bits"]:
        rises = {one["site"]: one["public"]["value"] for one in told["effects"] if one["bits"] == bits}
        effect = np.array([rises[site] for site in seen], float)
        print(f"\nRise of the loss at {bits} bits\n\n| predictor | rank correlation | 95% interval | p (Holm) | hits |")
        print("|---|---|---|---|---|")
        for row in leaderboard(predictors, effect):
            low, high = row.ci
            print(f"| {row.name} | {row.rho:+.2f} | {low:+.2f} to {high:+.2f} | {row.p_holm:.3f} | {row.hits} |")


if __name__ == "__main__":
    main()

"""Can activations be clipped to 8 bits, and does the tail of a site tell how?

    python benchmarks/activation_clip.py MODEL --calibration VALID.txt --text TEST.txt

Clips, and the tail weight tau of `mixed` (squared error below it, KL divergence at and above it), come from the
calibration windows; errors of the outputs and perplexities are of the text. Weights of 4 bits: rounded to nearest,
groups of 64, or the model in `--weights`. Without `--text` both come from the text that Python carries: a check that it
runs, no figure.

`first token apart`: the first token of every window is left out of the calibration and keeps its activations at full
precision, as runtimes can that hold a fixed prefix in the cache: what of the damage is the attention sink's.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from functools import partial

import torch

from geoquant.data.text import builtin_text, read_text, windows
from geoquant.evaluate.activations import activation_costs
from geoquant.evaluate.perplexity import difference, perplexity
from geoquant.lattice.grid import Grid
from geoquant.methods import METHODS, Problem
from geoquant.model.load import load
from geoquant.model.walk import read_weight, walk, write_weight
from geoquant.outliers.activation_clip import RULES, choose, mixed, per_token, quantize
from geoquant.outliers.activation_error import adapt_tau, input_histograms, judge_mixed, output_errors
from geoquant.outliers.tails import normal_tails, tails_of

KL = ("divergence", "divergence, even bins")


def first_apart(quantizer, x: torch.Tensor) -> torch.Tensor:
    """Everything but the first token of each window."""
    return torch.cat([x[:, :1], quantizer(x[:, 1:])], dim=1)


def rounded(model, blocks) -> None:
    """Weights to 4 bits, nearest codes, groups of 64, every column alike."""
    for site in (site for block in blocks for site in block.sites):
        module = model.get_submodule(site.name)
        weight = read_weight(module)
        problem = Problem(weight, torch.eye(weight.shape[1]), grid=Grid(4, 64))
        write_weight(module, METHODS["rtn"](problem).dequantize())


def kind_of(stage) -> str:
    """What reads this input."""
    return "/".join(site.name.rpartition(".")[2].removesuffix("_proj") for site in stage.sites)


def tail_table(stages, tails, apart) -> None:
    """Medians over the sites of a kind; of the kurtosis the range too."""
    print("| inputs of | sites | excess kurtosis (range) | without first tokens | beyond 6 sigma | beyond 20 medians |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = {}
    for stage in stages:
        rows.setdefault(kind_of(stage), []).append(stage.name)
    for kind, names in rows.items():
        of = [tails[name] for name in names]
        size = sorted(t.kurtosis for t in of)
        middle = {
            field: statistics.median(getattr(t, field) for t in of)
            for field in ("beyond_sigma", "beyond_median", "hill", "peak", "effective_bits")
        }
        without = statistics.median(apart[name].kurtosis for name in names)
        spread = f"{statistics.median(size):.3g} ({size[0]:.2g} to {size[-1]:.2g})"
        shares = f"{middle['beyond_sigma']:.1e} | {middle['beyond_median']:.1e}"
        print(f"| {kind} | {len(of)} | {spread} | {without:.3g} | {shares} |")
    null = normal_tails(min(t.count for t in tails.values()), torch.Generator().manual_seed(0))
    print(f"| a normal law | | {null.kurtosis:.2g} | | {null.beyond_sigma:.1e} | {null.beyond_median:.1e} |")
    print("\n| inputs of | Hill index, se | largest / median | bits used of 8 | without first tokens |")
    print("|---|---|---|---|---|")
    for kind, names in [*rows.items(), ("a normal law", None)]:
        of = [null] if names is None else [tails[name] for name in names]
        peak, used = (statistics.median(getattr(t, field) for t in of) for field in ("peak", "effective_bits"))
        index = f"{statistics.median(t.hill for t in of):.2f}, {statistics.median(t.hill_se for t in of):.2f}"
        without = "" if names is None else f"{statistics.median(apart[name].effective_bits for name in names):.1f}"
        print(f"| {kind} | {index} | {peak:.3g} | {used:.1f} | {without} |")


def error_table(stages, errors, rules, judge: str, title: str) -> None:
    """Geometric mean of the error of each rule, and at how many sites it is the best of those with one step."""
    print(f"\n{title}\n\n| inputs of | {' | '.join(rules)} | best per tensor |\n|{'---|' * (len(rules) + 2)}")
    kinds = {}
    for stage in stages:
        kinds.setdefault(kind_of(stage), []).append(errors[stage.name])
    for kind, found in [*kinds.items(), ("all", [errors[stage.name] for stage in stages])]:
        means = [math.exp(statistics.mean(math.log(getattr(of[rule], judge)) for of in found)) for rule in rules]
        wins = Counter(min(RULES, key=lambda rule, of=of: getattr(of[rule], judge)) for of in found)
        best = ", ".join(f"{rule} {count}" for rule, count in wins.most_common())
        print(f"| {kind} | {' | '.join(f'{mean:.2e}' for mean in means)} | {best} |")


def verdict(stages, calibrated, errors, tails, judge: str, heavy: str) -> dict[str, str]:
    """Print what mixing is worth; the rule of each site with the tau that the calibration tokens chose."""
    kurtosis = torch.tensor([tails[stage.name].kurtosis for stage in stages])

    def column(source, rule: str) -> torch.Tensor:
        return torch.tensor([getattr(source[stage.name][rule], judge) for stage in stages])

    tau = adapt_tau(kurtosis, column(calibrated, "squared"), column(calibrated, heavy))
    found = judge_mixed(kurtosis, column(errors, "squared"), column(errors, heavy), tau)
    single = heavy if found.single == "divergence" else found.single
    print(
        f"| {heavy} | {judge} | {tau:.3g} | {found.share:.0%} | {single} | {found.gain:+.3f} ± {found.se:.3f} "
        f"| {found.best:+.3f} | {found.p:.3f} |"
    )
    return {stage.name: mixed(tails[stage.name].kurtosis, tau, heavy) for stage in stages}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", help="a folder with the weights of 4 bits, as any reader sees them")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--calibration-windows", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=8, help="of the activations")
    arguments = parser.parse_args()
    bits, length = arguments.bits, arguments.length
    loaded = load(arguments.model)
    model = loaded.model.float()
    own = read_text(arguments.calibration) if arguments.calibration else builtin_text()
    calibration = windows(loaded.tokenizer, own, length=length, count=arguments.calibration_windows).tokens
    other, skip = (read_text(arguments.text), 0) if arguments.text else (own, len(calibration))
    text = windows(loaded.tokenizer, other, length=length, count=arguments.windows, skip=skip, source="text")
    blocks = walk(model, calibration[:1, :8])
    stages = [stage for block in blocks for stage in block.stages]
    sites = {stage.name: [site.name for site in stage.sites] for stage in stages}

    histograms = {skip: input_histograms(model, blocks, calibration, skip) for skip in (0, 1)}
    tails, apart = ({name: tails_of(found) for name, found in of.items()} for of in histograms.values())
    tail_table(stages, tails, apart)

    clips = {
        (skip, rule): {name: choose(histogram, rule, bits) for name, histogram in of.items()}
        for skip, of in histograms.items()
        for rule in RULES
    }

    def static(skip: int, rules: dict[str, str]) -> dict:
        return {name: partial(quantize, clip=clips[skip, rule][name], bits=bits) for name, rule in rules.items()}

    arms = {rule: static(0, dict.fromkeys(sites, rule)) for rule in RULES}
    arms["per token"] = dict.fromkeys(sites, partial(per_token, bits=bits))
    compared = ("squared", *KL)
    calibrated = output_errors(model, blocks, calibration, {rule: arms[rule] for rule in compared})
    errors = output_errors(model, blocks, text.tokens[:4], arms)
    error_table(stages, errors, list(arms), "energy", "Error of the outputs, `tr(W dX^T dX W^T) / tr(W X^T X W^T)`:")
    error_table(stages, errors, list(arms), "token", "The same, mean over tokens of each one's own relative error:")
    print("\n| mixed with | judge | tau | share | better single rule | mixed against it, ln | best of both | p |")
    print("|---|---|---|---|---|---|---|---|")
    choices = {
        f"{heavy}, by {judge}": verdict(stages, calibrated, errors, tails, judge, heavy)
        for heavy in KL
        for judge in ("energy", "token")
    }
    middle = statistics.median(t.kurtosis for t in tails.values())
    choices["divergence, at the middle"] = {name: mixed(t.kurtosis, middle) for name, t in tails.items()}
    # With an infinite tau mixing is one of the rules, measured already.
    choices = {by: chosen for by, chosen in choices.items() if len(set(chosen.values())) > 1}
    arms |= {f"mixed, {by}": static(0, chosen) for by, chosen in choices.items()}
    outs = {site.name for stage in stages for site in stage.sites if site.kind == "mlp_out"}
    partly = {name: arms["per token" if name in outs else "squared"][name] for name in sites}
    arms["squared, but per token into mlp out"] = partly
    for rule in ("percentile", "squared"):
        own_steps = static(1, dict.fromkeys(sites, rule))
        arms[f"{rule}, first token apart"] = {name: partial(first_apart, q) for name, q in own_steps.items()}
    spread = {arm: {site: q for name, q in of.items() for site in sites[name]} for arm, of in arms.items()}

    print(f"\n| weights | activations, {bits} bits | perplexity | delta NLL against the same weights | se |")
    print("|---|---|---|---|---|", flush=True)
    original = None
    for label in ("16 bits", arguments.weights or "4 bits, rounded to nearest"):
        if original is not None and arguments.weights:
            model = load(arguments.weights).model.float()
        elif original is not None:
            rounded(model, blocks)
        reference = perplexity(model, text)
        original = original or reference
        change = difference(original, reference)
        against = f" ({change['value']:+.4f} ± {change['se']:.4f} against the original)" if change["value"] else ""
        print(f"| {label} | as they are{against} | {reference.perplexity:.2f} | | |", flush=True)
        for arm, quantizers in spread.items():
            cost = activation_costs(model, text, {arm: quantizers}, reference)[1][arm]
            print(f"| | {arm} | {cost.perplexity.perplexity:.2f} | {cost.delta:+.4f} | {cost.se:.4f} |", flush=True)


if __name__ == "__main__":
    main()

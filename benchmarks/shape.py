"""What rounding does to the shape of a model's rows, each figure beside its null.

    pip install gudhi     # for the part `topology` only
    python benchmarks/shape.py MODEL [--text FILE] [--sites NAME ...] [--bits 4 3] [--parts distortion encoder ...]

distortion  MD of min-max rounding in groups of 64, and of Babai's rounding in the gradient-weighted metric of the
            inputs, Euclidean and in that metric, against noise as long; of all rows and of the 5% of largest kurtosis.
topology    distances of diagrams of 200 unit rows before and after, against noise as long and against other rows.
encoder     an autoencoder of width 16 against PCA on held-out rows, and on a Gaussian cloud.
picture     whether rows of large kurtosis form a cluster, in a plane and in all dimensions, against permuted labels.

The metric comes from a few windows of --text (default: the Python language reference) with one backward pass each.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from geoquant.data.text import builtin_text, read_text
from geoquant.geometry.encoder import compare_encoders
from geoquant.geometry.metric import judged_distortion, outlier_rows
from geoquant.geometry.pictures import picture
from geoquant.geometry.topology import topology
from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import compensation_factor
from geoquant.lattice.grid import Grid, dequantize

SITES = ["model.layers.0.self_attn.q_proj", "model.layers.15.mlp.gate_proj"]
PARTS = ["distortion", "topology", "encoder", "picture"]
GROUP = 64


def main() -> None:
    """Print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sites", nargs="+", default=SITES)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sites = {name: model.get_submodule(name) for name in arguments.sites}
    weights = {name: site.weight.detach().clone() for name, site in sites.items()}
    for part in arguments.parts:
        clock = time.process_time()
        if part == "distortion":
            text = read_text(arguments.text) if arguments.text else builtin_text()
            tokens = torch.tensor(tokenizer(text[:40000], add_special_tokens=False)["input_ids"])
            tokens = tokens[: arguments.windows * 256].view(-1, 256)
            show_distortion(weights, metrics(model, sites, tokens), arguments.bits)
        elif part == "topology":
            show_topology(weights, arguments.bits)
        elif part == "encoder":
            show_encoder(weights)
        else:
            show_pictures(weights)
        print(f"\n({part}: {time.process_time() - clock:.0f} CPU s)\n", flush=True)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Min-max rounding, a scale and a zero point for every 64 columns."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - low) / step).round() * step + low).flatten(1)


def compensated(weight: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Babai's rounding, the most used columns first, damped by 1% of the mean."""
    damped = metric + 0.01 * metric.diagonal().mean() * torch.eye(len(metric))
    order, grid = damped.diagonal().argsort(descending=True), Grid(bits, GROUP, symmetric=False)
    found = boxed_babai(weight, compensation_factor(damped, order, 0.0), order, grid, damped.diagonal())
    return dequantize(found.codes.T, found.scales.T, found.zeros.T, GROUP)


def metrics(model, sites: dict, tokens: Tensor) -> dict[str, Tensor]:
    """`sum_t |g_t|^2 x_t x_t^T` of every site, over its mean weight and the number of tokens."""
    sums = {name: torch.zeros(site.in_features, site.in_features) for name, site in sites.items()}
    weights = dict.fromkeys(sites, 0.0)
    inputs: dict[str, Tensor] = {}

    def forward(name):
        def see(_, given, output):
            inputs[name] = given[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: add(name, gradient.flatten(0, -2)))

        return see

    def add(name, gradient):
        energy = gradient.square().sum(1)
        sums[name] += (inputs[name] * energy[:, None]).T @ inputs[name]
        weights[name] += energy.sum().item()

    handles = [site.register_forward_hook(forward(name)) for name, site in sites.items()]
    for window in tokens:
        embedded = model.get_input_embeddings()(window[None]).requires_grad_()
        model(inputs_embeds=embedded, labels=window[None], use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: total / weights[name] for name, total in sums.items()}


def show_distortion(weights: dict, found: dict, bits: list[int]) -> None:
    print(
        "| site | bits | rounding | metric | rows | MD | noise | MD / noise | normal share | noise |\n|---"
        + "|---" * 9
        + "|"
    )
    for name, weight in weights.items():
        outliers = {"outliers": outlier_rows(weight)}
        for width in bits:
            for kind, changed in (
                ("min-max", rounded(weight, width)),
                ("Babai", compensated(weight, width, found[name])),
            ):
                for where, metric in (("plain", None), ("gradient", found[name])):
                    generator = torch.Generator().manual_seed(0)
                    judged = judged_distortion(weight, changed, generator, metric, classes=outliers)
                    for rows, each in (("all", judged.whole), *judged.classes.items()):
                        low, high = (each.ratio * math.exp(side * 1.96 * each.error) for side in (-1, 1))
                        print(
                            f"| {name} | {width} | {kind} | {where} | {rows} {each.rows} | {each.md:.3f} |"
                            f" {each.null_md:.3f} | {each.ratio:.3f} [{low:.3f}, {high:.3f}] | {each.share:.3f} |"
                            f" {each.null_share:.3f} |",
                            flush=True,
                        )


def show_topology(weights: dict, bits: list[int]) -> None:
    print(
        "| site | bits | distance | rounding | noise | other rows | p noise | p other rows |\n|---" + "|---" * 7 + "|"
    )
    for name, weight in weights.items():
        for width in bits:
            found = topology(weight, rounded(weight, width), torch.Generator().manual_seed(0))
            for kind in ("bottleneck", "wasserstein"):
                for degree in (0, 1):
                    nulls = [[getattr(draw, kind)[degree] for draw in each] for each in (found.noise, found.subsample)]
                    spans = " | ".join(f"{min(each):.4f} to {max(each):.4f}" for each in nulls)
                    p = " | ".join(f"{found.p(kind, degree, null):.2f}" for null in ("noise", "subsample"))
                    own = getattr(found.change, kind)[degree]
                    print(f"| {name} | {width} | {kind} H{degree} | {own:.4f} | {spans} | {p} |", flush=True)


def show_encoder(weights: dict) -> None:
    print(
        "| rows of | PCA, training / held out | random start | started at PCA | gain | error |\n|---" + "|---" * 5 + "|"
    )
    for name, weight in weights.items():
        compared = compare_encoders(weight)
        for kind, each in ((name, compared.found), ("Gaussian cloud", compared.null)):
            pairs = " | ".join(f"{a:.3f} / {b:.3f}" for a, b in (each.pca, each.random, each.started))
            print(f"| {kind} | {pairs} | {each.gain:+.4f} | {each.error:.4f} |", flush=True)


def show_pictures(weights: dict) -> None:
    print("| rows of | where | silhouette | permuted | p | Davies-Bouldin | permuted | p |\n|---" + "|---" * 7 + "|")
    for name, weight in weights.items():
        labels = torch.zeros(len(weight), dtype=torch.long)
        labels[outlier_rows(weight)] = 1
        for method in ("pca", "tsne"):
            found = picture(weight, labels.numpy(), method)
            for where, each in ((method, found.seen), ("all dimensions", found.among)):
                if method == "pca" or where == method:
                    print(
                        f"| {name} | {where} | {each.silhouette:+.3f} | {each.null_silhouette:+.3f} |"
                        f" {each.p_silhouette:.2f} | {each.davies_bouldin:.2f} | {each.null_davies_bouldin:.2f} |"
                        f" {each.p_davies_bouldin:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

"""Do spikes, islands and a functional core exist, beside sites that hold no structure? And is an island a long row?

    python benchmarks/signatures.py MODEL --text VALID.txt
    python benchmarks/signatures.py MODEL --text VALID.txt --leading 2

For the sites of some blocks, rows and single columns are classed (`outliers.fsgd`) with cutoffs that are quantiles of
the site's null, by which a site without structure has 1% spikes, about 10% core and 0.9% islands. Printed per kind of
site: the share of groups in each class and that of the null, means over sites with their standard error, and of islands
by the site's own quantiles as well; the rank correlation of the outlier factor with length; and the largest |cos| of a
row with any of 32 leading eigenvectors of the metric, since the published signature asks for 0.7. The error is that of
rounding to 3 bits in groups of 64.

`--leading K`: the K largest eigenvalues of the Gauss-Newton matrix of the whole model on 64 tokens instead.
"""

from __future__ import annotations

import argparse
import time

import torch

from geoquant.data.text import read_text, windows
from geoquant.model.load import load
from geoquant.model.walk import read_weight, walk
from geoquant.outliers.context import SiteContext
from geoquant.outliers.curvature import model_curvature
from geoquant.outliers.fsgd import fsgd
from geoquant.outliers.statistics import summarise

GROUP = 64
COLUMNS = ("core", "island", "own", "spike")


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """To 3 bits in symmetric groups along the input."""
    parts = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = parts.abs().amax(2, keepdim=True).clamp_min(1e-30) / 3.5
    levels = ((parts / scale - 0.5).round().clamp(-4, 3) + 0.5) * scale
    return levels.flatten(1)[:, : weight.shape[1]]


def contexts(model, sites, tokens):
    """Every site as a score sees it, by one forward and backward pass of all windows."""
    seen = {}

    def watch(name):
        def see(_, inputs, output):
            output.retain_grad()
            seen[name] = inputs[0].detach().flatten(0, 1), output

        return model.get_submodule(name).register_forward_hook(see)

    handles = [watch(site.name) for site in sites]
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for site in sites:
        x, output = seen.pop(site.name)
        unit = x.square().mean().sqrt().item()
        weight = read_weight(model.get_submodule(site.name))
        public = summarise(x, output.grad.flatten(0, 1), unit)
        yield SiteContext(site.name, site.kind, weight, rounded(weight) - weight, public)


def largest_cosine(context: SiteContext, leading: int = 32) -> float:
    vectors = torch.linalg.eigh(context.public.weighted.double()).eigenvectors[:, -leading:]
    weight = context.weight.double()
    return ((weight / weight.norm(dim=1, keepdim=True)) @ vectors).abs().max().item()


def with_error(values: list[float]) -> str:
    values = torch.tensor(values)
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 27])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--leading", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(args.model, dtype=torch.float32)
    model = loaded.model
    body = read_text(args.text)
    if args.leading:
        started = time.process_time()
        text = windows(loaded.tokenizer, body, length=64, count=1)
        found = model_curvature(model, text.tokens, args.leading, spare=6, limit=40, probes=3, tolerance=1e-2)
        print("eigenvalues", found.values.tolist(), "residuals", found.residuals.tolist(), "converged", found.converged)
        products, seconds = found.products + found.trace.products, time.process_time() - started
        print(f"trace {found.trace.value:.0f} ± {found.trace.se:.0f}; {products} products, {seconds:.0f} s of one core")
        for index in range(len(found.values)):
            shares = sorted(((share[index].item(), name) for name, share in found.shares.items()), reverse=True)
            print(index, *(f"{name} {share:.3f} (even {found.even[name]:.3f})" for share, name in shares[:4]))
        return
    text = windows(loaded.tokenizer, body, length=args.length, count=args.windows)
    sites = [site for block in walk(model, text.tokens[:1, :8]) for site in block.sites if block.index in args.blocks]
    rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    generator = torch.Generator().manual_seed(0)
    for context in contexts(model, sites, text.tokens):
        cosine = largest_cosine(context)
        for axis in ("row", "column"):
            for unit in (False, True):
                one, own = (
                    fsgd(context, generator, axis=axis, size=1, by_null=by_null, unit=unit) for by_null in (True, False)
                )
                numbers = {}
                for start, name in (("", "counts"), ("null ", "null_counts")):
                    shares = {key: value / len(one.labels) for key, value in getattr(one, name).items()}
                    shares["own"] = getattr(own, name)["island"] / len(own.labels)
                    numbers |= {start + key: value for key, value in shares.items()}
                numbers |= {"lengths": one.lengths, "null lengths": one.null_lengths, "cosine": cosine}
                key = axis, "directions" if unit else "as they are", context.kind
                rows.setdefault(key, []).append(numbers)
    print("| groups | isolation of | sites | | core | island | island, own quantiles | spike | LOF and length | cos |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (axis, of, kind), found in sorted(rows.items()):
        cells = (with_error([one[name] for one in found]) for name in (*COLUMNS, "lengths"))
        nulls = (with_error([one[f"null {name}"] for one in found]) for name in (*COLUMNS, "lengths"))
        cosine = max(one["cosine"] for one in found)
        print(f"| {axis}s | {of} | {len(found)} {kind} | site |", " | ".join(cells), f"| {cosine:.2f} |")
        print("| | | | null |", " | ".join(nulls), "| |", flush=True)


if __name__ == "__main__":
    main()

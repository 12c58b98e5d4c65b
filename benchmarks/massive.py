"""Does compression keep massive activations and the weights that make them?

    python benchmarks/massive.py MODEL --run RUN/coded --run RUN/dense --text TEST.txt

A massive activation is a coordinate of the residual stream hundreds of times larger than its median; one block's
down_proj makes it, mostly by one product of an input and a "super weight" (Yu et al. 2024, arXiv:2411.07191). For the
block where the largest one is born this prints the super weight, the activation and the perplexity: of the original, of
the original with that single weight set to zero, which is the reason to care, and of each run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from geoquant.data.text import read_text, windows
from geoquant.evaluate.perplexity import perplexity
from geoquant.model.load import load


def projections(model) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of what ends the MLP of every block, in order."""
    return [(name, module) for name, module in model.named_modules() if name.endswith(("down_proj", "c_proj", "fc2"))]


@torch.no_grad()
def largest_output(model, tokens) -> dict:
    """The largest number that any down_proj writes into the residual stream, relative to the median of its outputs, and
    the input that contributes most to it."""
    found = {"ratio": 0.0}

    def watch(name, module):
        def see(_, inputs, output):
            x, y = inputs[0].flatten(0, -2).float(), output.flatten(0, -2).float()
            ratio = (y.abs().max() / y.abs().median().clamp_min(1e-30)).item()
            if ratio > found["ratio"]:
                token, row = divmod(int(y.abs().argmax()), y.shape[1])
                products = module.weight[row].float() * x[token]
                column = int(products.abs().argmax())
                share = (products[column] / y[token, row]).item()
                found.update(ratio=ratio, name=name, token=token, row=row, column=column, share=share)

        return module.register_forward_hook(see)

    handles = [watch(name, module) for name, module in projections(model)]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def activation(model, tokens, name: str, token: int, row: int) -> float:
    """What the projection `name` writes there."""
    seen = []
    module = dict(model.named_modules())[name]
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.flatten(0, -2)[token, row].item()))
    model(tokens, use_cache=False)
    handle.remove()
    return seen[0]


@torch.no_grad()
def entry(model, name: str, row: int, column: int) -> float:
    """One weight, whatever the module keeps it as: its product with a unit vector, less what no input gives."""
    module = dict(model.named_modules())[name]
    columns = module.in_features
    units = torch.zeros(2, columns, dtype=torch.float32)
    units[1, column] = 1.0
    out = module(units.to(next(iter(model.parameters())).dtype)).float()
    return (out[1, row] - out[0, row]).item()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", type=Path, action="append", default=[], help="an exported folder of a run")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    model = loaded.model
    text = windows(loaded.tokenizer, read_text(arguments.text), length=512, count=arguments.windows, source="text")
    first = text.tokens[:1]
    found = largest_output(model, first)
    name, row, column, token = (found[key] for key in ("name", "row", "column", "token"))
    print(f"{name}: row {row}, column {column}, token {token}: {found['ratio']:.0f} times the median output,")
    print(f"of which one product makes {found['share']:.0%}\n")
    print("| model | super weight | activation | perplexity |\n|---|---|---|---|")

    def line(label: str, some) -> None:
        values = entry(some, name, row, column), activation(some, first, name, token, row)
        print(f"| {label} | {values[0]:.4f} | {values[1]:.1f} | {perplexity(some, text).perplexity:.2f} |", flush=True)

    line("original", model)
    weight = dict(model.named_modules())[name].weight
    kept = weight.data[row, column].item()
    weight.data[row, column] = 0.0
    line("original without that weight", model)
    weight.data[row, column] = kept
    del model, loaded, weight
    for run in arguments.run:
        import transformers

        import geoquant  # noqa: F401 (the reader)

        some = transformers.AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
        line(str(run), some)


if __name__ == "__main__":
    main()

"""What one intervention costs, and what it does: every site of some blocks, one at a time.

    python benchmarks/interventions.py MODEL --text FILE [--do quantize@3] [--blocks 2 15 27] [--windows 4]

Prints for each site the change of NLL with its paired standard error, CPU seconds, and the CPU seconds that the whole
pass times the share of the multiplications from that block on would take; then labels by the rule for function.
"""

from __future__ import annotations

import argparse
import time

import torch

from geoquant.data.text import read_text, windows
from geoquant.evaluate.perplexity import perplexity
from geoquant.model.load import load
from geoquant.model.walk import site_modules
from geoquant.outliers.effects import Material, effect, open_baseline
from geoquant.outliers.interventions import Part, parse
from geoquant.outliers.taxonomy import labels


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--do", default="quantize@3")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 27])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    loaded = load(arguments.model, dtype=torch.float32)
    model = loaded.model
    text = windows(loaded.tokenizer, read_text(arguments.text), length=arguments.window, count=arguments.windows)
    perplexity(model, text)
    begin = time.process_time()
    perplexity(model, text)
    whole = time.process_time() - begin
    baseline = open_baseline(model, loaded.tokenizer, Material(text))
    kept = baseline.resume
    print(f"whole pass {whole:.1f} CPU s, perplexity {baseline.measured.public.perplexity:.2f}")
    print(f"hidden states kept: {kept.bytes / 2**20:.0f} MiB, of every {kept.stride} blocks")
    modules = site_modules(model)
    sizes = [0] * (1 + max(int(name.split(".")[2]) for name in modules))
    for name, module in modules.items():
        sizes[int(name.split(".")[2])] += module.weight.numel()
    head = model.get_output_embeddings().weight.numel()
    found, spent, expected = [], [], []
    for name in modules:
        block = int(name.split(".")[2])
        if block not in arguments.blocks:
            continue
        begin = time.process_time()
        found.append(effect(baseline, Part(name), parse(arguments.do)))
        spent.append(time.process_time() - begin)
        expected.append(whole * (sum(sizes[block:]) + head) / (sum(sizes) + head))
        shift = found[-1].public
        print(
            f"{name:<40} {shift.value:+.4f} +- {shift.se:.4f} nats, {spent[-1]:5.2f} CPU s, "
            f"{expected[-1]:5.2f} by multiplications",
            flush=True,
        )
    for label in labels(found):
        if label.functional:
            print(label.sentence)
    print(
        f"mean {sum(spent) / len(spent):.2f} CPU s an intervention, {sum(expected) / len(spent):.2f} by "
        f"multiplications, whole pass {whole:.2f}"
    )


if __name__ == "__main__":
    main()

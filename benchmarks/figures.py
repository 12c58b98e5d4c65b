"""The figures of docs/results.md: perplexity, tasks, CPU seconds and memory of our quantization, one line per setting.

    python benchmarks/figures.py MODEL --calibration VALID.txt --test TEST.txt --bits 3 4 --task piqa.jsonl

Shared protocol: calibration on the first 32 windows of 512 tokens, test on the first 40 windows of 512, groups of
64, symmetric, linear layers of all blocks; embeddings and head untouched. Each setting runs in a fresh process, so
that CPU seconds and peak memory are its own; the peers' figures come from benchmarks/peers.py with the same texts.
`--set NAME=VALUE` changes any field of the recipe (e.g. --set metric=plain --set sequential=block).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(settings: dict) -> dict:
    """Quantize in this process as `geoquant quantize` does, then evaluate; the figures as a dict."""
    import tempfile

    import torch

    from geoquant import pipeline
    from geoquant.evaluate.perplexity import perplexity
    from geoquant.evaluate.tasks import answer, load_task
    from geoquant.exporting import write_export
    from geoquant.plan.estimate import cost
    from geoquant.recipe import Recipe
    from geoquant.results import site_reports

    recipe = Recipe(
        model=settings["model"],
        calibration=settings["calibration"],
        evaluation=settings["test"],
        evaluation_windows=40,
        **({"bits": settings["bits"]} if settings["bits"] else {}),
        **settings["recipe"],
    )
    started, wall = cpu_seconds(), time.perf_counter()
    loaded, blocks, texts, plan, _ = pipeline.prepare(recipe)
    row: dict = {"setting": settings["name"], "threads": torch.get_num_threads()}
    row["load_cpu_seconds"] = cpu_seconds() - started
    if settings["bits"] != 0:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            marks: dict[str, list[float]] = {}

            def progress(phase: str, done: int, total: int, note: str = "") -> None:
                marks.setdefault(phase, []).append(cpu_seconds())

            started, wall = cpu_seconds(), time.perf_counter()
            pipeline.solve(run, recipe, loaded, blocks, texts, plan, progress)
            seconds = time.perf_counter() - wall
            row["quantize_cpu_seconds"] = cpu_seconds() - started
            row["wall_seconds"] = seconds
            row["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            row["bits_per_weight"] = plan.bits_per_weight
            sites, row["warnings"], row["step_cpu_seconds"] = site_reports(run, blocks)
            if recipe.grid == "lattice":  # what the files really take
                entry = write_export(run, "geoquant", loaded, blocks)
                weights = sum(stage.rows * stage.columns for block in blocks for stage in block.stages)
                row["bits_per_weight"] = entry["linear_bytes"] * 8 / weights
                row["file_bytes"] = entry["bytes"]
                row["expected_delta_nll"] = sum(site["expected_loss"] for site in sites)
        if "gradients" in marks:
            row["step_cpu_seconds"]["gradients"] = marks["gradients"][-1] - started
        work = cost(loaded, blocks, texts.calibration.tokens.shape, recipe)
        row |= work.achieved(seconds) | {"compute_rate": work.compute_rate, "float32_rate": work.float32_rate}
    row["perplexity"] = perplexity(loaded.model, texts.evaluation).perplexity
    for path in settings["tasks"]:
        task = load_task(path, settings["items"])
        result = answer(loaded.model, loaded.tokenizer, task)
        row[task.name] = {"accuracy": result.accuracy, "se": result.se, "items": result.items}
    return row


def main() -> None:
    """Run every setting in a process of its own; print one JSON line each and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    parser.add_argument(
        "--keep", type=float, nargs="*", default=[0.0], help="shares of kept columns, each with each bits"
    )
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="rates of the lattice, bits per weight")
    parser.add_argument("--original", action="store_true", help="measure the unquantized model as well")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the recipe")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    changes = {name: literal(value) for name, _, value in (item.partition("=") for item in arguments.set)}
    shared = {
        "model": arguments.model,
        "calibration": arguments.calibration,
        "test": arguments.test,
        "tasks": arguments.task,
        "items": arguments.items,
    }
    label = "".join(f", {name} {value}" for name, value in changes.items())
    jobs = [{"name": "original", "bits": 0, "recipe": {}}] if arguments.original else []
    jobs += [
        {
            "name": f"{bits} bits" + (f", {keep:.0%} of columns kept" if keep else "") + label,
            "bits": bits,
            "recipe": changes | ({"keep": keep} if keep else {}),
        }
        for bits in arguments.bits
        for keep in arguments.keep
    ]
    jobs += [
        {"name": f"lattice, {rate:g} bits{label}", "bits": None, "recipe": changes | {"rate": rate}}
        for rate in arguments.rate
    ]
    rows = []
    for job in jobs:
        command = [sys.executable, __file__, arguments.model, "--calibration", "-", "--test", "-"]
        done = subprocess.run(
            [*command, "--one", json.dumps(shared | job)], stdout=subprocess.PIPE, check=True, text=True
        )
        print(done.stdout.strip().splitlines()[-1], flush=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(table(rows))


def literal(text: str) -> object:
    """A number or a boolean where the text is one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def table(rows: list[dict]) -> str:
    """Markdown."""
    tasks = [name for name, value in rows[0].items() if isinstance(value, dict) and "accuracy" in value]
    costs = ["MB on disk", "CPU s", "wall s", "peak GiB", "share of GEMM peak"]
    head = ["setting", "bits per weight", "perplexity", *tasks, *costs]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row["setting"],
            f"{row['bits_per_weight']:.3f}" if "bits_per_weight" in row else "-",
            f"{row['perplexity']:.2f}",
            *(f"{100 * row[name]['accuracy']:.1f} ± {100 * row[name]['se']:.1f}" for name in tasks),
            f"{row['file_bytes'] / 1e6:.1f}" if "file_bytes" in row else "-",
            f"{row['quantize_cpu_seconds']:.0f}" if "quantize_cpu_seconds" in row else "-",
            f"{row['wall_seconds']:.0f}" if "wall_seconds" in row else "-",
            f"{row['peak_rss_bytes'] / 2**30:.2f}" if "peak_rss_bytes" in row else "-",
            f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

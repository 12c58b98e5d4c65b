"""How long does quantizing take, in units of the bare passes over the calibration text?

    python benchmarks/calibration.py MODEL --calibration VALID.txt --arm rate=3 --arm bits=3

Bare: what anybody who calibrates on these windows with gradients has to do: one forward pass of the model as
transformers runs it, in the same number format, with the loss of every token, and one backward pass to the inputs of
the first block, weights frozen, nothing observed. The arms run from the loaded model to the solved one, without
measurements and export. Each in a process of its own; wall time and CPU seconds, the parts of an arm in CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

from paired import changes


def timed(function: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call."""
    wall, spent = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - spent}


def bare(settings: dict) -> dict:
    """Forward, and forward with backward, of the model over the windows, `batch` windows at a time."""
    import torch

    from geoquant import pipeline
    from geoquant.observe.compute import compute_dtype
    from geoquant.recipe import Recipe

    recipe = Recipe(**settings["recipe"])
    loaded, _, texts, *_ = pipeline.prepare(recipe)
    compute = compute_dtype(recipe.compute, loaded.model.device)
    model = loaded.model.to(compute).requires_grad_(False)
    batches = texts.calibration.tokens.split(settings["batch"])

    def passes(backward: bool) -> None:
        for tokens in batches:
            with torch.set_grad_enabled(backward):
                inputs = model.get_input_embeddings()(tokens).detach().requires_grad_(backward)
                loss = model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss
                if backward:
                    loss.backward()

    with torch.no_grad():
        model(batches[0], use_cache=False)  # the first call does not count
    return {"forward": timed(lambda: passes(False)), "forward + backward": timed(lambda: passes(True))}


def quantized(settings: dict) -> dict:
    """One arm: the whole, its gradient pass, and what its stages took."""
    import tempfile
    from pathlib import Path

    from geoquant import pipeline
    from geoquant.recipe import Recipe
    from geoquant.results import site_reports

    recipe = Recipe(**settings["recipe"])
    loaded, blocks, texts, plan, _ = pipeline.prepare(recipe)
    marks: dict[str, float] = {}

    def progress(what: str, done: int, count: int, _: str) -> None:
        if done == count:
            marks[what] = time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        whole = timed(lambda: pipeline.solve(Path(folder), recipe, loaded, blocks, texts, plan, progress))
        parts = Counter({"gradients": marks.get("gradients", 0.0)})
        parts.update(site_reports(Path(folder), blocks)[2])
    return {"whole": whole, "parts": dict(parts)}


def measured(settings: dict) -> dict:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, text=True, capture_output=True).stdout.splitlines()[-1])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--arm", action="append", default=[], help="fields of the recipe, separated by commas")
    parser.add_argument("--batch", type=int, default=2, help="windows that the bare passes take at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        settings = json.loads(arguments.one)
        print(json.dumps(bare(settings) if "batch" in settings else quantized(settings)))
        return
    base = {"model": arguments.model, "calibration": arguments.calibration}
    passes = measured({"recipe": base, "batch": arguments.batch})
    unit = passes["forward + backward"]
    print("| | wall, s | CPU, s | of the bare passes | parts |\n|---|---|---|---|---|")
    for name, spent in passes.items():
        print(f"| bare {name} | {spent['wall']:.0f} | {spent['cpu']:.0f} | {spent['wall'] / unit['wall']:.2f} | |")
    for arm in arguments.arm:
        found = measured({"recipe": base | changes(arm)})
        whole, parts = found["whole"], ", ".join(f"{name} {spent:.0f}" for name, spent in found["parts"].items())
        ratio = whole["wall"] / unit["wall"]
        print(f"| {arm} | {whole['wall']:.0f} | {whole['cpu']:.0f} | {ratio:.2f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()

"""Does a setting help? The same settings over several calibration texts, judged on one test text.

    python benchmarks/paired.py MODEL --calibration VALID.txt --test TEST.txt --sets 6 \\
        --arm bits=3 --arm bits=3,keep=0.01 --arm bits=3,group_size=40

One calibration set moves the perplexity of a 3-bit model by one or two per cent, more than most settings do. Set k is
made of windows 32 k to 32 k + 31 of the calibration text; each arm changes fields of the recipe. Printed: every
perplexity, and for every arm but the first the mean over the sets of log(perplexity / first arm's), with its standard
error. `--jobs 2` runs two arms at a time, one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from figures import literal


def measure(settings: dict) -> dict:
    """One arm on one set, in this process."""
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    from geoquant import pipeline
    from geoquant.data.text import read_text, windows
    from geoquant.evaluate.perplexity import perplexity
    from geoquant.measure import builtin_tail
    from geoquant.recipe import Recipe
    from geoquant.results import site_reports

    if settings["recipe"].pop("follow", False):  # output targets for blocks too, which the product does not offer
        Recipe.follows_drift = property(lambda recipe: recipe.target == "outputs" and recipe.sequential != "off")
    recipe = Recipe(**settings["recipe"])
    loaded, blocks, texts, plan, _ = pipeline.prepare(recipe)
    calibration = windows(
        loaded.tokenizer,
        read_text(recipe.calibration),
        length=recipe.window,
        count=recipe.windows,
        source=recipe.calibration,
        skip=settings["set"] * recipe.windows,
    )
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "token_weights.safetensors"
        kept = settings.get("gradients") and Path(settings["gradients"]) / f"{gradient_key(settings)}.safetensors"
        if kept and kept.exists():
            shutil.copy(kept, own)
        pipeline.solve(
            Path(folder), recipe, loaded, blocks, replace(texts, calibration=calibration), plan, lambda *_: None
        )
        spent = time.process_time() - started
        if kept and own.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(own, kept)
        sites = site_reports(Path(folder), blocks)[0]
    elsewhere = builtin_tail(loaded.tokenizer, recipe.window, 20)  # text of another kind: Python's language reference
    weights = [math.prod(site["shape"]) for site in sites]
    bits = sum(site["bits_per_weight"] * count for site, count in zip(sites, weights)) / sum(weights)
    return {
        "perplexity": perplexity(loaded.model, texts.evaluation).perplexity,
        "elsewhere": perplexity(loaded.model, elsewhere).perplexity,
        "bits": bits,
        "cpu_seconds": spent,
    }


def gradient_key(settings: dict) -> str:
    """A name for the gradient pass of an arm: what it depends on."""
    recipe = settings["recipe"]
    needed = ("model", "calibration", "windows", "window", "gradient_share", "row_block", "compute", "embeddings")
    used = {name: recipe[name] for name in needed if name in recipe}
    if "rate" in recipe:  # the forecasts of the lattice
        used |= {"grid": "lattice", "order": recipe.get("order"), "damping": recipe.get("damping")}
    return hashlib.sha256(json.dumps([settings["set"], used], sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    """Run every arm on every set; print one JSON line each and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--sets", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return

    def run(job: tuple[int, str]) -> dict:
        row = run_arm(arguments.model, arguments.calibration, arguments.test, *job)
        print(json.dumps(row), flush=True)
        return row

    jobs = [(number, arm) for number in range(arguments.sets) for arm in arguments.arm]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(run, jobs))
    print(table(rows, arguments.arm))


def changes(arm: str) -> dict:
    """The recipe's fields that an arm (`NAME=VALUE,...`) sets."""
    return {name: literal(value) for name, _, value in (item.partition("=") for item in arm.split(","))}


def run_arm(model: str, calibration: str, test: str, number: int, arm: str, gradients: str | None = None) -> dict:
    """One arm on one set, in a process of its own with one thread.

    gradients: a folder where gradient passes wait for arms that need the same; such arms spend less CPU time.
    """
    texts = {"calibration": calibration, "evaluation": test, "evaluation_windows": 40}
    settings = {"set": number, "recipe": {"model": model, **texts, **changes(arm)}, "gradients": gradients}
    command = [sys.executable, __file__, model, "--calibration", "-", "--test", "-", "--one", json.dumps(settings)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=one_thread)
    return {"set": number, "arm": arm, **json.loads(done.stdout.strip().splitlines()[-1])}


def against(rows: list[dict], arm: str, first: str, text: str = "perplexity") -> str:
    """Mean log(perplexity / first arm's) in % over the sets that both arms were run on, and its standard error.

    text: `perplexity`, on the test text, or `elsewhere`.
    """
    found = {(row["set"], row["arm"]): row[text] for row in rows if text in row}
    sets = [number for number, other in found if other == arm and (number, first) in found]
    logs = [100 * math.log(found[number, arm] / found[number, first]) for number in sets]
    if arm == first or not logs:
        return "-"
    if len(logs) == 1:
        return f"{logs[0]:+.2f} (one set)"
    return f"{statistics.mean(logs):+.2f} ± {statistics.stdev(logs) / math.sqrt(len(logs)):.2f}"


def table(rows: list[dict], arms: list[str]) -> str:
    """Markdown: perplexities by set, and each arm against the first."""
    found = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    sets = [f"set {row['set']}" for row in found[arms[0]]]
    head = ["arm", "bits per weight", *sets, "against the first, %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in arms:
        bits = statistics.mean(row["bits"] for row in found[arm])
        cells = [arm, f"{bits:.3f}", *(f"{row['perplexity']:.2f}" for row in found[arm]), against(rows, arm, arms[0])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

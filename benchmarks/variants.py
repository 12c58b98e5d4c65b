"""Which form of "one lattice for the model" is best, end to end, at equal bits?

    python benchmarks/variants.py MODEL --calibration VALID.txt --test TEST.txt --out FOLDER --rate 2.5 --sets 0

Protocol and sets are those of benchmarks/paired.py; linear layers only. Bits are those of codes, steps and classes as
coded; the tables that the whole model shares (0.01 bit here) are left out. FOLDER keeps one JSON line per run, so that
a stopped command goes on where it was, and the gradients of a set, which arms with the same metric share.

The product has no switches for most arms: each run is a process of its own, in which `arm_in_place` puts other
functions into geoquant's modules. The arms, their metric first:

default          G (x) A_g, G in blocks of 64 rows
nats             (G / tr G) (x) (tr G A_g): the same in other units; what it differs by is rounding
diagonal         a diagonal G without a floor (a share of the mean of each block, which is the row alone)
diagonal-floor   a diagonal G, its floor a share of the site's mean: `row_block=1`
site-floor       blocks of 64 rows, the floor a share of the site's mean
clipped, plain   G (x) A: the gradient for the rows and D only
floor=F          another floor of G than 0.05

and how bits are divided. These know how many bits every stage took in the default run of the same set and rate: the
forecast of each stage is moved until it goes through that point.

known            one D
equal            every stage has the same rate
milp, milp-wide  rates B - 1 ... B + 1 (B - 2 ... B + 2) in steps of a quarter, chosen by mixed-integer programming for
                 the least sum of n D^2 / 24
attention=R      no attention projection has less than R bits, one D for the others
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import paired
from geoquant import pipeline, results, steps
from geoquant.lattice.rows import RowMetric, block_sizes, row_metric
from geoquant.methods import METHODS
from geoquant.methods.problem import Problem
from geoquant.observe import gradient
from geoquant.observe.moments import Accumulator, clipped_weights
from geoquant.plan.rate import Forecast, RateControl

ARMS = (  # those that say most come first
    *("default", "diagonal-floor", "equal", "milp", "clipped", "attention=1.5", "floor=0.2", "floor=0.01", "nats"),
    *("diagonal", "attention=2", "floor=0.5", "known", "plain", "site-floor", "milp-wide"),
)
DIVIDED = ("known", "equal", "milp", "milp-wide", "attention")  # the default's metric, another division of bits


# ---- the metric


def with_site_floor(stage, curvature: Tensor) -> RowMetric:
    """`steps.rows_of` with the floor taken from the mean of the site instead of the block."""
    curvature, sizes, start = curvature.clone(), block_sizes([s.shape[0] for s in stage.sites], curvature.shape[-1]), 0
    for site in stage.sites:
        blocks = -(-site.shape[0] // curvature.shape[-1])
        diagonal = curvature[start : start + blocks].diagonal(dim1=1, dim2=2)
        diagonal += steps.FLOOR * diagonal.sum() / site.shape[0]
        start += blocks
    return row_metric(curvature, sizes, floor=0.0, keep=steps.BELIEF)


def without_floor(stage, curvature: Tensor) -> RowMetric:
    """`steps.rows_of` with the floor of a single row taken from the row, which only changes its unit."""
    sizes = block_sizes([site.shape[0] for site in stage.sites], curvature.shape[-1])
    return row_metric(curvature, sizes, floor=steps.FLOOR, keep=steps.BELIEF)


def in_nats(solve: Callable) -> Callable:
    """The same problem with the trace of G moved from the rows to the columns."""

    def moved(problem: Problem):
        inverse = torch.linalg.inv(problem.rows.factor.double())
        squares = problem.rows.spread(inverse.square().sum(2))  # diagonal of G = U^-1 U^-T
        trace = squares.sum().item()
        rows = replace(problem.rows, factor=problem.rows.factor * trace**0.5)
        heldout = None if problem.heldout is None else problem.heldout * trace
        return solve(replace(problem, hessian=problem.hessian * trace, heldout=heldout, rows=rows))

    return moved


def ungraded(clipped: bool) -> type[Accumulator]:
    """What a forecast sees: moments whose tokens have no gradient weights, in sum as heavy as those that have."""

    class Ungraded(Accumulator):
        def add(self, x: Tensor, weights: Tensor, *, held: bool) -> None:
            plain = clipped_weights(x.square().sum(1)) if clipped else torch.ones_like(weights)
            super().add(x, plain * (weights.sum() / plain.sum()), held=held)

    return Ungraded


# ---- the division of bits


@dataclass
class Divided(RateControl):
    """Stages whose rates follow a rule with one free number x, set anew for every stage so that the whole meets the
    target: `rule(name, x)` is the rate of a stage, falling in x."""

    rule: Callable[[str, float], float] = lambda name, x: x

    def step(self) -> float:
        goal = self.target * sum(known.weights for known in self.forecasts.values()) - sum(self.spent.values())
        rest = [name for name, _ in self.stages if name not in self.spent]
        x = falling(lambda x: sum(self.forecasts[name].weights * self.rule(name, x) for name in rest), goal)
        return 2.0 ** falling(self.forecasts[rest[0]].at, self.rule(rest[0], x))


def falling(function: Callable[[float], float], goal: float) -> float:
    """Where a falling function of an octave reaches `goal`."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > goal else (low, middle)
    return low


def divided(arm: str, control: RateControl, known: dict[str, list[float]]) -> RateControl:
    """The controller of an arm. known: step and bits per weight of every stage in the default run."""
    curves, spent, total = {}, 0.0, 0
    for name, curve in control.forecasts.items():
        step, bits = known[name]
        miss = bits - curve.at(math.log2(step))
        curves[name] = Forecast(curve.log2_steps, tuple(max(0.0, at + miss) for at in curve.bits), curve.weights)
        spent, total = spent + bits * curve.weights, total + curve.weights
    rate = spent / total
    kind, _, value = arm.partition("=")
    if kind == "equal":
        wanted = dict.fromkeys(curves, rate)
    elif kind in ("milp", "milp-wide"):
        wanted = programmed(curves, rate, 2.0 if kind == "milp-wide" else 1.0)

    def rule(name: str, x: float) -> float:
        if kind in ("known", "attention"):  # x is log2 D
            least = float(value) if kind == "attention" and "attn" in name else 0.0
            return max(least, curves[name].at(x))
        return max(0.0, wanted[name] - x)

    return Divided(rate, curves, [(name, None) for name, _ in control.stages], rule=rule)


def planned(control: Divided) -> float:
    """Sum of `n D^2 / 24` if every stage cost what its curve says."""
    curves, total = control.forecasts, sum(curve.weights for curve in control.forecasts.values())
    x = falling(lambda x: sum(curves[name].weights * control.rule(name, x) for name in curves), control.target * total)
    return sum(c.weights * 4.0 ** falling(c.at, control.rule(name, x)) / 24 for name, c in curves.items())


def programmed(curves: dict[str, Forecast], rate: float, reach: float) -> dict[str, float]:
    """The rate of every stage, of a few, for the least sum of `n D^2 / 24` within `rate` bits per weight."""
    import numpy
    from scipy import optimize, sparse

    choices = [rate + quarter / 4 for quarter in range(round(-4 * reach), round(4 * reach) + 1)]
    choices = [choice for choice in choices if choice > 0.3]
    weights = numpy.array([curve.weights for curve in curves.values()], dtype=float)
    losses = [[4.0 ** falling(curve.at, choice) / 24 for choice in choices] for curve in curves.values()]
    costs = (weights[:, None] * numpy.array(losses)).ravel()
    once = sparse.kron(sparse.identity(len(curves)), numpy.ones((1, len(choices))))
    bits = numpy.outer(weights / weights.sum(), choices).ravel()[None]
    found = optimize.milp(
        costs / costs.min(),
        constraints=[optimize.LinearConstraint(once, 1, 1), optimize.LinearConstraint(bits, 0, rate + 1e-9)],
        integrality=numpy.ones(len(costs)),
        bounds=optimize.Bounds(0, 1),
        options={"time_limit": 30.0, "mip_rel_gap": 1e-4},
    )
    if found.x is None:
        raise SystemExit(f"no division of bits found: {found.message}")
    return dict(zip(curves, (choices[k] for k in found.x.reshape(len(curves), -1).argmax(1))))


# ---- one run


@contextmanager
def arm_in_place(arm: str, known: dict | None, cache: Path) -> Iterator[None]:
    """Within it geoquant, in this process, is what the arm says."""
    kind, _, value = arm.partition("=")
    look_back, curvature_of = pipeline.look_back, steps.curvature_of
    changed = [(steps, "curvature_of", lambda path, observe: curvature_of(cache, observe))]
    others = {"diagonal": without_floor, "diagonal-floor": with_site_floor, "site-floor": with_site_floor}
    if kind in others:
        changed += [(module, "rows_of", others[kind]) for module in (steps, pipeline)]
    if kind == "floor":
        changed.append((steps, "FLOOR", float(value)))
    if kind in ("clipped", "plain"):
        changed.append((gradient, "Accumulator", ungraded(kind == "clipped")))
        fill = math.nan if kind == "clipped" else 1.0  # without a gradient tokens are weighted by their size

        def ungraded_tokens(*args, **options):
            curvature, control = look_back(*args, **options)
            tokens = {name: torch.full_like(weights, fill) for name, weights in curvature.tokens.items()}
            return replace(curvature, tokens=tokens), control

        changed.append((pipeline, "look_back", ungraded_tokens))
    if kind in DIVIDED:

        def redivided(*args, **options):
            curvature, control = look_back(*args, **options)
            return curvature, divided(arm, control, known)

        changed.append((pipeline, "look_back", redivided))
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    method = METHODS["lattice"]
    try:
        for module, name, function in changed:
            setattr(module, name, function)
        if kind == "nats":
            METHODS["lattice"] = in_nats(method)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
        METHODS["lattice"] = method


def measure(job: dict) -> dict:
    """One arm on one set at one rate, in this process: what `paired.measure` gives, and step and rate of the stages."""
    seen: list[dict] = []
    site_reports = results.site_reports

    def kept(run: Path, blocks: tuple):
        reports = site_reports(run, blocks)
        names = {stage.name for block in blocks for stage in block.stages}
        for site in reports[0]:
            if site["name"] in names:  # a stage has the name of its first site
                seen.append({"name": site["name"], "step": site["step"], "bits": 0.0, "weights": 0})
            count = math.prod(site["shape"])
            seen[-1]["bits"] += count * site["bits_per_weight"]
            seen[-1]["weights"] += count
        return reports

    results.site_reports = kept
    shared = job["arm"].partition("=")[0] in (*DIVIDED, "default", "nats")
    name = "shared" if shared else job["arm"]
    try:
        with arm_in_place(job["arm"], job["known"], Path(job["out"]) / f"set{job['set']}-{name}.safetensors"):
            found = paired.measure(job)
    finally:
        results.site_reports = site_reports
    losses = [stage["weights"] * stage["step"] ** 2 / 24 for stage in seen]
    stages = {stage["name"]: [stage["step"], stage["bits"] / stage["weights"]] for stage in seen}
    return {**found, "expected_loss": sum(losses), "stages": stages}


def main() -> None:
    """Run what FOLDER lacks, print a line for each, and tables of all that it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--rate", type=float, nargs="*", default=[2.5])
    parser.add_argument("--sets", type=int, nargs="*", default=[0], help="numbers of the calibration sets")
    parser.add_argument("--arm", action="append", metavar="ARM", help="default: all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the recipe")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(Path(arguments.one).read_text()))))
        return
    for arm in arguments.arm or ():
        if arm.partition("=")[0] not in {known.partition("=")[0] for known in ARMS}:
            parser.error(f"no arm {arm}; there are {', '.join(ARMS)}")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    recipe = {"calibration": arguments.calibration, "evaluation": arguments.test, "evaluation_windows": 40}
    recipe |= {"model": arguments.model, "embeddings": False, "method": "lattice"}
    recipe |= {name: paired.literal(value) for name, _, value in (item.partition("=") for item in arguments.set)}
    arms = list(dict.fromkeys(["default", *(arguments.arm or ARMS)]))
    for rate, number, arm in (
        (rate, number, arm) for rate in arguments.rate for number in arguments.sets for arm in arms
    ):
        known = {row["arm"]: row for row in rows if (row["rate"], row["set"]) == (rate, number)}
        if arm in known:
            continue
        changes = {"rate": rate} | ({"row_block": 1} if arm.startswith("diagonal") else {})
        job = {"arm": arm, "set": number, "out": str(out), "recipe": recipe | changes}
        job["known"] = known["default"]["stages"] if "default" in known else None
        (out / "job.json").write_text(json.dumps(job))
        command = [sys.executable, __file__, "-", "--calibration", "-", "--test", "-", "--out", "-"]
        done = subprocess.run(
            [*command, "--one", str(out / "job.json")],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        row = {"rate": rate, "set": number, "arm": arm, **json.loads(done.stdout.strip().splitlines()[-1])}
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{rate:g} bits, set {number}, {arm}: {row['perplexity']:.3f} at {row['bits']:.4f}", flush=True)
    print(tables(rows))
    print(plans(rows, out))


def tables(rows: list[dict]) -> str:
    """Markdown, for each rate: all arms on the first set, then those that have two sets, and so on; how the arms
    divide the bits."""
    parts = []
    for rate in sorted({row["rate"] for row in rows}):
        here = sorted((row for row in rows if row["rate"] == rate), key=lambda row: row["set"])
        sets = sorted({row["set"] for row in here if row["arm"] == "default"})
        for count in range(1, len(sets) + 1):
            wanted = [row for row in here if row["set"] in sets[:count]]
            names = dict.fromkeys(["default", *(row["arm"] for row in wanted)])
            arms = [arm for arm in names if sum(row["arm"] == arm for row in wanted) == count]
            parts += [f"At {rate:g} bits, {count} set{'s' * (count > 1)}:", paired.table(wanted, arms)]
        parts += [f"At {rate:g} bits, how bits are divided:", division(here, slope_of(rows, rate))]
    return "\n\n".join(parts)


def plans(rows: list[dict], out: Path) -> str:
    """Markdown: what the divisions promise on the curves of the default runs, whether they were run or not, and how
    far these curves had to be moved."""
    arms = [arm for arm in ARMS if arm.partition("=")[0] in DIVIDED]
    head = ["rate", "set", *arms, "bits that forecasts lacked: least, mean, most"]
    lines = ["", "Sum of n D²/24 as planned, nats:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in (row for row in rows if row["arm"] == "default"):
        _, curves = steps.curvature_of(out / f"set{row['set']}-shared.safetensors", lambda: ({}, {}))
        control = RateControl(row["rate"], curves, [(name, None) for name in row["stages"]])
        found = [f"{planned(divided(arm, control, row['stages'])):.4f}" for arm in arms]
        lacked = [bits - curves[name].at(math.log2(step)) for name, (step, bits) in row["stages"].items()]
        found.append(f"{min(lacked):.2f}, {statistics.mean(lacked):.2f}, {max(lacked):.2f}")
        lines.append(f"| {row['rate']:g} | {row['set']} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def slope_of(rows: list[dict], rate: float) -> float:
    """Change of log perplexity per bit: of the default between this rate and the nearest other on the same set."""
    known = [row for row in rows if row["arm"] == "default"]
    pairs = [(a, b) for a in known for b in known if a["rate"] == rate and b["rate"] != rate and a["set"] == b["set"]]
    if not pairs:
        return math.nan
    a, b = min(pairs, key=lambda pair: abs(pair[0]["bits"] - pair[1]["bits"]))
    return math.log(a["perplexity"] / b["perplexity"]) / (a["bits"] - b["bits"])


def division(rows: list[dict], slope: float) -> str:
    """Markdown: the log-ratio to the default corrected to equal bits, rates and steps of the stages, expected loss."""
    label = "log-ratio, bits as they are, %" if math.isnan(slope) else "log-ratio at equal bits, %"
    head = ["arm", "set", label, "rates of stages: least - median - most", "D, largest / smallest", "sum n D²/24, nats"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = {row["set"]: row for row in rows if row["arm"] == "default"}
    for row in (row for row in rows if row["set"] in first):
        other = first[row["set"]]
        # Without a second rate nothing is known of the slope; bits are then equal within what the controller misses.
        ratio = math.log(row["perplexity"] / other["perplexity"])
        ratio -= 0.0 if math.isnan(slope) else slope * (row["bits"] - other["bits"])
        used, rates = zip(*row["stages"].values())
        middle = statistics.median(rates)
        cells = [
            row["arm"],
            f"{row['set']}",
            f"{100 * ratio:+.2f}",
            f"{min(rates):.2f} - {middle:.2f} - {max(rates):.2f}",
        ]
        cells += [f"{max(used) / min(used):.2f}", f"{row['expected_loss']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

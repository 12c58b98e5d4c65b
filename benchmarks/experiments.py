"""What do other searches find on the problems of a real run? Layer errors against Babai's, at equal bits.

    python benchmarks/experiments.py dump MODEL --calibration VALID.txt --out PROBLEMS --rate 2.5
    python benchmarks/experiments.py lattice PROBLEMS
    python benchmarks/experiments.py box PROBLEMS --bits 3
    python benchmarks/experiments.py headroom PROBLEMS

`dump` solves the model on the lattice and keeps the problems of some blocks. The others solve them on the calibration
tokens without the held-out ones (one window in eight; they only chose the damping) and judge on both.

`lattice`: all stages at one global step, and the step such that together they take the bits that Babai takes. Losses
are `tr(G E A E^T)`, G in blocks of 64 rows, summed over the stages. `box`: steps as each method stores them, losses
`tr(E A E^T)`, geometric mean of the ratios to Babai's. `headroom`: dB that reductions of the basis could gain, and what
LLL does. Seconds are of CPU, for all stages together.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoquant import pipeline
from geoquant.lattice.basis import compensation_factor, damped
from geoquant.lattice.certificate import error_energies
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import column_order
from geoquant.lattice.rate import site_bits, spread_of
from geoquant.lattice.reduce import headroom, lll
from geoquant.lattice.rows import RowMetric, block_sizes, single_rows
from geoquant.methods import (
    METHODS,
    LatticeSolution,
    Problem,
    babai,
    descent,
    kbest,
    klein,
    lattice,
    priced,
    refit,
    rtn,
)
from geoquant.recipe import Recipe

Solver = Callable[[Problem], LatticeSolution]


# ---- the problems


@dataclass(frozen=True)
class Stage:
    """A problem without its held-out tokens, in the same units and at the damping that they chose; their metric, scaled
    to the same trace."""

    name: str
    problem: Problem
    heldout: Tensor


def dump(model: str, calibration: str, out: Path, rate: float, blocks: list[int]) -> None:
    """Solve `model` on the lattice and keep the problems of some blocks, one file per stage."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {"method": "lattice", "target": "weights", "embeddings": False}
    recipe = Recipe(model=model, calibration=calibration, rate=rate, **settings)
    loaded, walked, texts, plan, _ = pipeline.prepare(recipe)
    stages = iter([stage for block in walked for stage in block.stages])
    wanted = {stage.name for number in blocks for stage in walked[number].stages}
    method = METHODS["lattice"]

    def kept(problem: Problem):
        name = next(stages).name
        if name in wanted:
            torch.save(problem, out / f"{name}.pt")
            print(name, tuple(problem.weight.shape), flush=True)
        return method(problem)

    METHODS["lattice"] = kept
    with tempfile.TemporaryDirectory() as folder:
        pipeline.solve(Path(folder), recipe, loaded, walked, texts, plan, lambda *_: None)


def stages_in(folder: Path) -> list[Stage]:
    """What `dump` left."""
    found = []
    for path in sorted(folder.glob("*.pt")):
        problem = torch.load(path, weights_only=False)
        damping = lattice.choose_damping(problem, column_order("activation", problem.pooled, len(problem.pooled)))[0]
        whole = problem.pooled.diagonal().sum()
        metrics = [metric * (whole / metric.diagonal().sum()) for metric in (problem.hessian, problem.heldout)]
        alone = replace(problem, hessian=metrics[0], heldout=None, damping=damping, order="activation")
        found.append(Stage(path.stem, alone, metrics[1]))
    return found


# ---- the lattice


def curvature(rows: RowMetric) -> Tensor:
    """G in blocks."""
    inverse = torch.linalg.inv(rows.factor.double())
    return inverse @ inverse.mT


def regrouped(rows: RowMetric, size: int) -> RowMetric:
    """The same G, but only smaller blocks of it; one row: its diagonal."""
    whole = curvature(rows)
    if size == 1:
        return single_rows(torch.cat([b.diagonal()[:n] for b, n in zip(whole, rows.sizes)]).float())
    sizes = block_sizes(list(rows.sizes), size)
    parts = [b[i : i + size, i : i + size] for b, n in zip(whole, rows.sizes) for i in range(0, n, size)]
    blocks = torch.eye(size, dtype=torch.float64).repeat(len(sizes), 1, 1)
    for block, part in zip(blocks, parts):
        block[: len(part), : len(part)] = part
    lower = torch.linalg.cholesky(blocks.flip(1, 2))
    identity = torch.eye(size, dtype=torch.float64).expand_as(blocks)
    return RowMetric(torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2).float(), sizes)


def losses(stage: Stage, difference: Tensor) -> list[float]:
    """`tr(G D A D^T)` per token, in sample and held out."""
    rows = stage.problem.rows
    parts = [
        torch.linalg.solve_triangular(factor[: len(part), : len(part)].T, part, upper=False)
        for factor, part in zip(rows.factor, difference.split(rows.sizes))
    ]
    return [x / stage.problem.tokens for x in error_energies(parts, stage.problem.hessian, stage.heldout)]


def together(stages: list[Stage], solve: Solver, step: float, block: int) -> tuple[float, list[float], float]:
    """Bits per weight, losses and seconds of all stages at one global step."""
    bits, loss, seconds = 0.0, [0.0, 0.0], 0.0
    for stage in stages:
        given = replace(stage.problem, step=step)
        if block < 64:
            given = replace(given, rows=regrouped(given.rows, block))
        started = time.process_time()
        solution = solve(given)
        seconds += time.process_time() - started
        bits += site_bits(solution.codes, spread_of(solution.codes))
        found = losses(stage, solution.dequantize() - given.weight)
        loss = [a + b for a, b in zip(loss, found)]
    return bits / sum(stage.problem.weight.numel() for stage in stages), loss, seconds


def at_rate(stages: list[Stage], solve: Solver, step: float, block: int, bits: float) -> tuple[float, list, float]:
    """Step, losses and seconds where the stages take `bits`: by secants, the rest by the slope of a fine lattice."""
    octave, slope, before = math.log2(step), 0.95, None
    for _ in range(4):
        found, loss, seconds = together(stages, solve, 2**octave, block)
        if abs(found - bits) < 0.003:
            break
        if before is not None and abs(octave - before[0]) > 1e-3:
            slope = min(max((before[1] - found) / (octave - before[0]), 0.6), 1.1)
        before = octave, found
        octave += (found - bits) / slope
    return 2**octave, [value * 4 ** (found - bits) for value in loss], seconds


def by(search: Callable[[lattice.Posed], Tensor]) -> Solver:
    """A search of codes at steps, order and damping as always."""
    return lambda given: lattice.solve_by(given, search)


LATTICE_ARMS: dict[str, tuple[Solver, int]] = {  # how, rows of a block
    "Babai, blocks of 64 rows": (by(lattice.babai), 64),
    "blocks of 16 rows": (by(lattice.babai), 16),
    "rows alone": (by(lattice.babai), 1),
    "nearest codes": (rtn.solve_lattice, 1),
    "K-best 4, rows alone": (by(partial(kbest.search, survivors=4)), 1),
    "K-best 8, rows alone": (by(partial(kbest.search, survivors=8)), 1),
    "Klein, best of 8, rows alone": (by(partial(klein.search, runs=8)), 1),
    "descent, rows alone": (by(descent.search), 1),
    "descent": (by(descent.search), 64),
    **{f"price {mu:.2f}": (by(partial(priced.search, mu=mu)), 64) for mu in (0.06, 0.08, 0.09, 0.1, 0.12, 0.15)},
    "price 0.10, rows alone": (by(partial(priced.search, mu=0.1)), 1),
    "price 0.10, descent": (by(partial(descent.search, mu=0.1)), 64),
    "price 0.06, descent": (by(partial(descent.search, mu=0.06)), 64),
    "price 0.12, descent": (by(partial(descent.search, mu=0.12)), 64),
}


def lattice_table(stages: list[Stage], coarser: float, names: list[str]) -> None:
    """Each search at the bits of Babai in blocks of 64 rows."""
    step = coarser * math.exp(statistics.mean(math.log(stage.problem.step) for stage in stages))
    solve, block = LATTICE_ARMS["Babai, blocks of 64 rows"]
    bits, first, seconds = together(stages, solve, step, block)
    print(f"{len(stages)} stages, {bits:.3f} bits per weight\n")
    print("| search | loss, % | held out, % | in bits | step | CPU s |\n|---|---|---|---|---|---|")
    print(f"| Babai, blocks of 64 rows | - | - | - | 1 | {seconds:.1f} |", flush=True)
    for name in names or list(LATTICE_ARMS)[1:]:
        solve, block = LATTICE_ARMS[name]
        at, loss, seconds = at_rate(stages, solve, step, block, bits)
        change = [100 * (a / b - 1) for a, b in zip(loss, first)]
        worth = math.log2(loss[1] / first[1]) / 2
        print(
            f"| {name} | {change[0]:+.2f} | {change[1]:+.2f} | {worth:+.3f} | {at / step:.3f} | {seconds:.1f} |",
            flush=True,
        )


# ---- the box


def polished(problem: Problem, solution):
    """Refit, Babai, descent, refit."""
    solution = refit.rounded_again(problem, refit.refit(problem, solution))
    return refit.refit(problem, descent.improved(problem, solution))


BOX_ARMS = {
    "min-pivot order": None,
    "K-best 4": partial(kbest.improved, survivors=4),
    "K-best 8": partial(kbest.improved, survivors=8),
    "descent": descent.improved,
    "steps refitted": refit.refit,
    "refit, Babai, refit": refit.improved,
    "refit, Babai, descent, refit": polished,
}


def box_table(stages: list[Stage], grid: Grid) -> None:
    """Each improvement of Babai's solution."""
    ratios: dict[str, list[list[float]]] = {name: [] for name in BOX_ARMS}
    seconds = dict.fromkeys(["Babai", *BOX_ARMS], 0.0)
    for stage in stages:
        given = replace(stage.problem, grid=grid, order="group-aware")

        def judged(solution, given=given, stage=stage) -> list[float]:
            return error_energies(solution.dequantize() - given.weight, given.hessian, stage.heldout)

        started = time.process_time()
        plain = babai.solve(given)
        seconds["Babai"] += time.process_time() - started
        first = judged(plain)
        for name, improve in BOX_ARMS.items():
            started = time.process_time()
            found = improve(given, plain) if improve else babai.solve(replace(given, order="min-pivot"))
            seconds[name] += time.process_time() - started
            ratios[name].append([math.log(a / b) for a, b in zip(judged(found), first)])
        print(f"{stage.name} done", flush=True)
    print(f"\n{len(stages)} stages, {grid.bits} bits, groups of {grid.group_size}\n")
    print("| method | loss, % | held out, % | worst held out, % | CPU s |\n|---|---|---|---|---|")
    print(f"| Babai | - | - | - | {seconds['Babai']:.1f} |")
    for name, found in ratios.items():
        means = [100 * math.expm1(statistics.mean(column)) for column in zip(*found)]
        worst = 100 * math.expm1(max(row[1] for row in found))
        print(f"| {name} | {means[0]:+.2f} | {means[1]:+.2f} | {worst:+.2f} | {seconds[name]:.1f} |")


# ---- reduction, and what a refit would find on the lattice


def gain(lengths: Tensor) -> float:
    """Headroom in dB."""
    return -10 * math.log10(1 - headroom(lengths))


def headroom_table(stages: list[Stage]) -> None:
    """dB by which a reduction could lower Babai's expected error (6.02 dB are one bit), and LLL on the worst basis."""
    print(
        "One step per stage: headroom by order, what LLL gains after the activation order and how many swaps it takes."
    )
    print("Lattice: headroom at the steps in use. Least-squares scale of rows: mean over rows, plain and priced.\n")
    print("| stage | natural | activation | min-pivot | LLL gains | swaps | CPU s | lattice | scale | priced |")
    print("|---|" + "---|" * 9)
    for stage in stages:
        given, cells = stage.problem, []
        metric = given.hessian / given.tokens
        for name in ("natural", "activation", "min-pivot"):
            order = column_order(name, metric, len(metric))
            factor = compensation_factor(metric, order, given.damping)
            cells.append(f"{gain(factor.diagonal().reciprocal()):.2f}")
        order = column_order("activation", metric, len(metric)).flip(0)
        basis = torch.linalg.cholesky(damped(metric, given.damping)[order][:, order].double()).T
        started = time.process_time()
        reduced, _, swaps = lll(basis)
        seconds = time.process_time() - started
        before, after = (10 * math.log10(r.diagonal().square().sum().item()) for r in (basis, reduced))
        plain, cheap = (lattice.solve_by(given, search) for search in (lattice.babai, priced.search))
        scales = [f"{scale_of(given, solution):.3f}" for solution in (plain, cheap)]
        cells += [f"{before - after:.3f}", str(swaps), f"{seconds:.1f}", f"{gain(plain.basis_lengths[1]):.3f}", *scales]
        print(f"| {stage.name.removeprefix('model.layers.')} | " + " | ".join(cells) + " |", flush=True)


def scale_of(problem: Problem, solution) -> float:
    """Mean over rows of the factor by which least squares would scale a row."""
    values = solution.dequantize()
    metric = damped(problem.hessian, problem.damping)
    image = values @ metric
    used = (image * values).sum(1) > 0
    return ((image * problem.weight).sum(1)[used] / (image * values).sum(1)[used]).mean().item()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("dump")
    making.add_argument("model")
    making.add_argument("--calibration", required=True)
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--rate", type=float, default=2.5)
    making.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    for name in ("lattice", "box", "headroom"):
        commands.add_parser(name).add_argument("problems", type=Path)
    commands.choices["lattice"].add_argument("--coarser", type=float, default=1.0, help="multiplies the step")
    commands.choices["lattice"].add_argument("--only", action="append", default=[], choices=list(LATTICE_ARMS))
    commands.choices["box"].add_argument("--bits", type=int, default=3)
    commands.choices["box"].add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.command == "dump":
        dump(arguments.model, arguments.calibration, arguments.out, arguments.rate, arguments.blocks)
        return
    stages = stages_in(arguments.problems)
    if arguments.command == "lattice":
        lattice_table(stages, arguments.coarser, arguments.only)
    elif arguments.command == "box":
        box_table(stages, Grid(arguments.bits, arguments.group_size))
    else:
        headroom_table(stages)


if __name__ == "__main__":
    main()

"""What do other searches find on the problems of a real run? Layer errors against Babai's, at equal bits.

python benchmarks/experiments.py dump MODEL --calibration VALID.txt --out PROBLEMS --rate 2.5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from geoquant import pipeline
from geoquant.lattice.certificate import error_energies
from geoquant.lattice.order import column_order
from geoquant.lattice.rate import site_bits, spread_of
from geoquant.lattice.rows import RowMetric
from geoquant.methods import METHODS, Problem, lattice
from geoquant.recipe import Recipe

# ---- the problems


def dump(model: str, calibration: str, out: Path, rate: float, blocks: list[int]) -> None:
    """Solve `model` on the lattice and keep the problems of some blocks, one file per stage."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(model=model, calibration=calibration, rate=rate, target="weights", embeddings=False)
    loaded, walked, texts, plan, _ = pipeline.prepare(recipe)
    stages = iter([stage for block in walked for stage in block.stages])
    wanted = {stage.name for number in blocks for stage in walked[number].stages}
    method = METHODS["lattice"]

    def kept(problem):
        name = next(stages).name
        if name in wanted:
            torch.save(problem, out / f"{name}.pt")
            print(name, tuple(problem.weight.shape), flush=True)
        return method(problem)

    METHODS["lattice"] = kept
    with tempfile.TemporaryDirectory() as folder:
        pipeline.solve(Path(folder), recipe, loaded, walked, texts, plan, lambda *_: None)


# ---- the judge


def alone(problem: Problem) -> Problem:
    """The problem without its held-out tokens, in the same units, at the damping that they chose."""
    if isinstance(problem.rows, RowMetric):
        order = column_order("activation", problem.pooled, len(problem.pooled))
        damping = lattice.choose_damping(problem, order)[0]
    share = problem.pooled.diagonal().sum() / problem.hessian.diagonal().sum()
    return replace(problem, hessian=problem.hessian * share, heldout=None, damping=damping)


def losses(problem: Problem, difference: Tensor, *metrics: Tensor) -> list[float]:
    """`tr(G D A D^T)` under each metric."""
    parts = []
    for factor, part in zip(problem.rows.factor, difference.split(problem.rows.sizes)):
        parts.append(torch.linalg.solve_triangular(factor[: len(part), : len(part)].T, part, upper=False))
    return error_energies(parts, *metrics)


def measured(problem: Problem, heldout: Tensor, search: Callable) -> tuple[float, list[float], float]:
    """Bits per weight, loss on the tokens solved on and on others, and CPU seconds."""
    started = time.process_time()
    solution = lattice.solve_by(problem, search)
    seconds = time.process_time() - started
    bits = site_bits(solution.codes, spread_of(solution.codes)) / solution.codes.numel()
    return bits, losses(problem, solution.dequantize() - problem.weight, problem.hessian, heldout), seconds


def at_rate(problem: Problem, heldout: Tensor, search: Callable, bits: float) -> tuple[list[float], float, float]:
    """Losses and seconds of a search at the step where it takes `bits` per weight, and that step's ratio to the
    problem's own: by secants, what is left by the slope of a fine lattice."""
    octave, slope, before = 0.0, 1.0, None
    for _ in range(4):
        found, loss, seconds = measured(replace(problem, step=problem.step * 2**octave), heldout, search)
        if abs(found - bits) < 0.002:
            break
        if before is not None and abs(octave - before[0]) > 1e-3:
            slope = min(max((before[1] - found) / (octave - before[0]), 0.3), 1.2)
        before = octave, found
        octave += (found - bits) / slope
    return [value * 4 ** (found - bits) for value in loss], seconds, 2**octave


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
    arguments = parser.parse_args()
    started = time.process_time()
    dump(arguments.model, arguments.calibration, arguments.out, arguments.rate, arguments.blocks)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()

"""How much longer than its unavoidable matrix products does the solve of a site take?

    OMP_NUM_THREADS=1 python benchmarks/solver.py

Of a site with c columns and d rows the products are `2 c^3 / 3 + c^2 d` multiplications and as many additions, timed as
such products on this machine: a square one of the same c for the first part, the site's own shape for the second. The
parts of a solve: `damping` (three or more dampings on held-out moments), `factor` (of the metric), `recursion` (of the
box: with its search for steps), `target` (the shift to the outputs). Metrics are of random tokens with a falling
spectrum; CPU seconds, the least of several tries, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from geoquant.lattice.babai import boxed_babai
from geoquant.lattice.basis import compensation_factor, metric_factor
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import column_order
from geoquant.lattice.rows import row_metric
from geoquant.lattice.unboxed import exponents, steps_of, unboxed_babai
from geoquant.methods import babai, lattice, priced
from geoquant.methods.problem import Problem
from geoquant.methods.target import output_target

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (2048, 2048))


def seconds(function: Callable[[], object], tries: int) -> float:
    """The least CPU time of several calls, the first of which does not count."""
    function()
    found = []
    for _ in range(tries):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


def moments(columns: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """`X^T X` of random tokens whose spectrum falls by four orders of magnitude."""
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    return x.T @ x


def measure(rows: int, columns: int, tries: int) -> dict[str, float]:
    """Seconds of the parts, and of the products."""
    generator = torch.Generator().manual_seed(0)
    hessian, heldout = moments(columns, 7 * columns, generator), moments(columns, columns, generator)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    pooled, none = (hessian + heldout) / (8 * columns), torch.zeros(0, dtype=torch.int64)
    square = seconds(lambda: hessian @ heldout, tries)  # 2 c^3
    products = square * 2 / 3 + seconds(lambda: weight @ hessian, tries)
    problem = Problem(weight, hessian, heldout, grid=Grid(3, 64), tokens=8 * columns)
    order = column_order("activation", pooled, columns)
    basis = metric_factor(pooled, order, 0.01)
    lengths = torch.empty(columns)
    lengths[order] = basis.diagonal()
    steps = steps_of(exponents(0.3 * lengths.log().mean().exp() / lengths))
    row_steps = steps_of(exponents(torch.full((rows,), 0.05)))
    curvature = torch.randn(-(-rows // 64), 64, 256, generator=generator)
    known = row_metric(curvature @ curvature.mT, (64,) * (rows // 64), floor=0.05, keep=0.7)
    posed = lattice.Posed(weight, pooled, 0.01, basis, order, row_steps, steps, known, 1.0, 0.05)
    grouped, importance = column_order("group-aware", pooled, 64), pooled.diagonal()
    boxed = compensation_factor(pooled, grouped, 0.01)
    drift = 0.01 * hessian
    return {
        "products": products,
        "lattice: factor": seconds(lambda: metric_factor(pooled, order, 0.01), tries),
        "recursion, rows alone": seconds(lambda: unboxed_babai(weight, basis, order, row_steps, steps), tries),
        "recursion, blocks of 64": seconds(lambda: unboxed_babai(weight, basis, order, row_steps, steps, known), tries),
        "with a price": seconds(lambda: priced.search(posed), tries),
        "damping": seconds(lambda: lattice.choose_damping(problem, order), tries),
        "box: factor": seconds(lambda: compensation_factor(pooled, grouped, 0.01), tries),
        "recursion and steps": seconds(
            lambda: boxed_babai(weight, boxed, grouped, problem.grid, importance, free=0), tries
        ),
        "damping ": seconds(lambda: babai.choose_damping(problem, none), tries),
        "target": seconds(lambda: output_target(weight, hessian, drift, heldout, 0.01 * heldout), tries),
    }


def main() -> None:
    """Print a table: milliseconds of the products, everything else in units of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    arguments = parser.parse_args()
    lines: list[str] = []
    for rows, columns in SHAPES:
        found = measure(rows, columns, arguments.tries)
        products = found.pop("products")
        if not lines:
            lines = ["| rows x columns | products, ms | " + " | ".join(name.strip() for name in found) + " |"]
            lines.append("|" + "---|" * (len(found) + 2))
        ratios = (f"{value / products:.1f}" for value in found.values())
        lines.append(f"| {rows} x {columns} | {1000 * products:.1f} | " + " | ".join(ratios) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What tangent spaces and distortion cost: one large site measured, whole models extrapolated from it.

    OMP_NUM_THREADS=1 python benchmarks/geometry_cost.py [--device cuda] [--size 4096]

Rows are Gaussian (the cost does not depend on what they are), changes are their rounding to 4 bits. FLOPs are counted:
2 N m D for the distances of m of N rows, 2 k^2 D m for the Gram matrices of k neighbours, 8 k D m for the two
projections of MD; eigenvalues of k x k are left out. The share of the peak is against a matrix product of the same
precision, measured here. Models are extrapolated as a rate of distances and a rate of the rest, from the measured
site; a site of another shape is measured too and says how far that holds.

Published figures, on other hardware: 42 s and 7.8 GB for one 4096 x 4096 site on a GPU; 3.7 s on an A100 and 12.3 s on
a server CPU for rows of an 8B model (how many is not said); 15 minutes for a 70B model.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from geoquant.geometry.distortion import cache, distortion, quick
from geoquant.geometry.tangent import NEIGHBOURS, neighbours

K = NEIGHBOURS
SPARSE = 0.05
CACHED = (16, 64)  # rows of the quick check
MODELS = {
    "8B": (32, [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]),
    "70B": (80, [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]),
}
PUBLISHED = {"8B": "3.7 s (A100), 12.3 s (server CPU)", "70B": "15 min"}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    device, size = torch.device(arguments.device), arguments.size
    peak = gemm(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread"
    print(f"{where}, float32 matrix product {peak / 1e9:.0f} GFLOP/s\n")
    start = memory(device)
    print("| site | rows | wall s | CPU s | GFLOP | share of the product's rate |\n|---" + "|---" * 5 + "|")
    near, rest = measured(size, size, None, device, peak)
    measured(size, size, SPARSE, device, peak)
    small = size // 4
    took = sum(measured(small, size, None, device, peak))
    expected = seconds(small, size, 1.0, near, rest)
    print(f"\nPeak memory {memory(device):.2f} GB, {start:.2f} of it before the first site.")
    print(f"The rates of the first site give the last {expected:.2f} s; it took {took:.2f}.\n")
    print("| model | rows | extrapolated | published, other hardware |\n|---|---|---|---|")
    for name, (blocks, shapes) in MODELS.items():
        for share in (1.0, SPARSE):
            total = blocks * sum(seconds(*shape, share, near, rest) for shape in shapes)
            told = f"{total:.0f} s" if total < 600 else f"{total / 3600:.1f} h"
            print(f"| {name} | {share:.0%} | {told} | {PUBLISHED[name]} |")
    print("\nQuick check of cached rows, ms a site:\n\n| columns | " + " | ".join(f"{n} rows" for n in CACHED) + " |")
    print("|---" * (1 + len(CACHED)) + "|")
    for columns in (576, 4096, 14336):
        print(f"| {columns} | " + " | ".join(f"{check(columns, count, device):.2f}" for count in CACHED) + " |")


def gemm(device: torch.device, size: int = 2048) -> float:
    """FLOP/s of the best of five products."""
    a = torch.randn(size, size, device=device)
    return 2 * size**3 / min(used(clocked(lambda: a @ a, device), device) for _ in range(5))


def used(clocks: tuple[float, float], device: torch.device) -> float:
    """The CPU seconds on a CPU, which others may share; else the wall's."""
    return clocks[0] if device.type == "cuda" else clocks[1]


def clocked(run, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def memory(device: torch.device) -> float:
    """Peak GB so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def work(n: int, d: int, share: float) -> tuple[float, float]:
    """FLOPs of the distances and of the rest."""
    m = max(1, round(share * n))
    return 2.0 * n * m * d, (2.0 * K * K + 8 * K) * m * d


def seconds(n: int, d: int, share: float, near: float, rest: float) -> float:
    """From seconds per FLOP of both parts."""
    distances, others = work(n, d, share)
    return distances * near + others * rest


def measured(n: int, d: int, share: float | None, device: torch.device, peak: float) -> tuple[float, float]:
    """Print a row; seconds per FLOP of the distances and of the rest, or seconds where the site is not square."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, d, generator=generator, device=device)
    step = weight.abs().amax(1, keepdim=True) / 7
    change = (weight / step).round() * step - weight
    rows = None if share is None else torch.randperm(n, generator=generator, device=device)[: round(share * n)]
    clocks = clocked(lambda: distortion(weight, change, rows=rows), device)
    flops = work(n, d, share or 1.0)
    whole = used(clocks, device)
    count = n if rows is None else len(rows)
    print(
        f"| {n} x {d} | {count} | {clocks[0]:.2f} | {clocks[1]:.2f} | {sum(flops) / 1e9:.0f} |"
        f" {sum(flops) / whole / peak:.0%} |",
        flush=True,
    )
    near = used(clocked(lambda: neighbours(weight, rows=rows), device), device)
    parts = near, whole - near
    return (parts[0] / flops[0], parts[1] / flops[1]) if n == d else parts


def check(columns: int, count: int, device: torch.device) -> float:
    """Milliseconds of the quick check of some rows: the mean of 50, after one."""
    generator = torch.Generator(device).manual_seed(0)
    points = torch.randn(600, columns, generator=generator, device=device)
    known = cache(points, torch.arange(count, device=device))
    changes = torch.randn(count, columns, generator=generator, device=device)
    quick(known, changes)
    return 1e3 * used(clocked(lambda: [quick(known, changes) for _ in range(50)], device), device) / 50


if __name__ == "__main__":
    main()

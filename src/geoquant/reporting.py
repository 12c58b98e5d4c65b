"""From a run's pieces to the `report.json` dict: facts only, no measuring."""

from __future__ import annotations

import gc
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from geoquant.data.records import Split
from geoquant.evaluate.perplexity import Perplexity, difference
from geoquant.export import OWN, gguf, snippet
from geoquant.export.compressed_tensors import stored_bits
from geoquant.export.gptq import scheme_of
from geoquant.export.verify import VerifyResult
from geoquant.export.weights import ExportResult
from geoquant.lattice.grid import Grid
from geoquant.manifest import versions
from geoquant.measure import Quality, Texts
from geoquant.model.load import Loaded
from geoquant.model.paging import trim
from geoquant.model.walk import Block
from geoquant.plan.uniform import Plan, SitePlan, kept_count
from geoquant.recipe import Recipe
from geoquant.report.words import VOCABULARY
from geoquant.results import site_reports
from geoquant.runs import read_json

__all__ = [
    "Clock",
    "assemble",
    "export_entry",
    "failures",
    "forget_peak_memory",
    "model_facts",
    "planned_size",
    "told",
    "verification",
]

SCHEMA = 1


class Clock:
    """Wall seconds per phase: `with clock("solve"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def forget_peak_memory() -> None:
    """Count the largest resident size from here on: what the process did before is not this run's. Linux only."""
    gc.collect()
    trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Largest resident size of this process, since `forget_peak_memory` where that is possible."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_facts(loaded: Loaded) -> dict:
    """Name, architecture and size of the model."""
    return {
        "name": loaded.name,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.parameters,
        "source": loaded.source,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "bytes": sum(parameter.nbytes for parameter in loaded.model.parameters()),
        "sha256": loaded.sha256,
    }


def export_entry(name: str, run: Path, written: ExportResult, adapter: ExportResult | None) -> dict:
    """The `exports` entry of one format."""
    folder = written.folder.name
    return {
        "format": name,
        "path": folder,
        "bytes": written.bytes_total + (adapter.bytes_total if adapter else 0),
        "linear_bytes": written.bytes_linear + (adapter.bytes_linear if adapter else 0),
        "adapter_bytes": adapter.bytes_total if adapter else 0,
        "notes": [*written.notes],
        "verified": None,
        "unread": None,
        "snippet": snippet(str(run / folder), str(run / "adapter") if adapter else None, format=name),
    }


def verification(result: VerifyResult | None, failure: str | None) -> dict:
    """What the report says of a reload; of one that the readers could not even begin, only why."""
    measured = dict.fromkeys(("max_abs_diff", "max_rel", "rms_rel", "tolerance"))
    if result is not None:
        measured = {name: getattr(result, name) for name in measured}
    readers = {} if result is None else result.versions
    return {**measured, "ok": failure is None, "readers": readers, "failure": failure}


def failures(exports: list[dict]) -> list[str]:
    """Why exports did not pass their reload, one line each."""
    told = (entry["verified"].get("failure") for entry in exports if entry["verified"])
    return [failure for failure in told if failure]


def told(exports: list[dict]) -> list[str]:
    """What the report warns of: what writing changed, what nobody reloaded, what did not pass its reload."""
    lines = []
    for entry in exports:
        lines += [f"{entry['format']}: {note}" for note in entry.get("notes", ())]
        lines += [f"{entry['path']} was not verified: {entry['unread']}"] if entry.get("unread") else []
    return lines + failures(exports)


def planned_size(loaded: Loaded, plan: Plan, format: str) -> dict:
    """Sizes of one format's files as planned: sites as the format stores them, everything else as it is."""
    facts, width = model_facts(loaded), torch.finfo(loaded.dtype).bits // 8
    # Formats of other people leave embeddings as they are.
    sites = [site for site in plan.sites if format in OWN or site.kind not in VOCABULARY]
    weights = sum(math.prod(site.shape) for site in sites)
    linear = weights * width if format == "dense" else _packed_bytes(sites, format)
    return {
        "bits_per_weight": plan.bits_per_weight,
        "linear_bytes": linear,
        "total_bytes": linear + facts["bytes"] - weights * width,
        "original_bytes": facts["bytes"],
    }


def _packed_bytes(sites: list[SitePlan], format: str) -> int:
    """Sites as a format's file holds them, and kept columns in the adapter (16-bit columns and selector)."""
    if format in OWN:
        return sum(int(math.prod(site.shape) * site.bits_per_weight / 8) for site in sites)
    # Codes of the lattice become int8 with one scale per row.
    boxed = [(site.grid or Grid(8, site.shape[1], True), *site.shape) for site in sites]
    scheme = scheme_of(boxed) if format == "gptq" else None
    total = 0
    for site, (grid, rows, columns) in zip(sites, boxed):
        if scheme is not None:
            bits = scheme.stored_bits(rows, columns)
        else:
            bits = gguf.stored_bits(grid) if format == "gguf" else stored_bits(grid, columns)
        total += int(rows * columns * bits / 8) + 2 * kept_count(site.keep, columns) * (rows + columns)
    return total


def quality(texts: Texts, before: Quality, after: Quality) -> dict:
    """The `quality` part of report.json."""

    def plain(value: Perplexity) -> dict:
        return {key: item for key, item in value.to_dict().items() if key != "windows"}

    return {
        "text": texts.evaluation.source,
        "windows": len(texts.evaluation),
        "window": texts.evaluation.tokens.shape[1],
        "original": plain(before.perplexity),
        "quantized": plain(after.perplexity),
        "delta_nll": difference(before.perplexity, after.perplexity),
        "kl": {"value": after.divergence.kl, "se": after.divergence.se, "top1": after.divergence.top1},
        "tasks": [],
    }


def assemble(
    run: Path,
    recipe: Recipe,
    facts: dict,
    blocks: tuple[Block, ...],
    plan: Plan,
    texts: Texts,
    split: Split | None,
    before: Quality,
    after: Quality,
    privacy: dict | None,
    exports: list[dict],
    notes: tuple[str, ...],
    solver: dict | None,
    clock: Clock,
    command: str,
) -> dict:
    """The whole report."""
    sites, warnings, cpu = site_reports(run, blocks)
    manifest = read_json(run / "manifest.json")
    main = exports[0] if exports else None
    # Of what each site got: the plan does not know which of them fell back to rounding.
    weights = [math.prod(site["shape"]) for site in sites]
    reached = sum(s["bits_per_weight"] * n for s, n in zip(sites, weights)) / sum(weights)
    if recipe.grid == "lattice" and abs(reached / plan.bits_per_weight - 1) > 0.01:
        warnings.append(
            f"asked for {plan.bits_per_weight:.4g} bits per weight, got {reached:.3f}: a small or strange model, whose "
            "steps and last sites weigh too much"
        )
    return {
        "schema": SCHEMA,
        "model": {key: value for key, value in facts.items() if key not in ("bytes", "sha256")},
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "command": command,
        "created": manifest["created"],
        "seed": recipe.seed,
        "hashes": manifest["hashes"],
        "size": {
            "bits_per_weight": reached,
            "file_bits_per_weight": main["linear_bytes"] * 8 / sum(weights) if main else None,
            "linear_bytes": main["linear_bytes"] if main else 0,
            "total_bytes": main["bytes"] if main else 0,
            "original_bytes": facts["bytes"],
            "kept_bytes": main["adapter_bytes"] if main else 0,
        },
        "quality": quality(texts, before, after)
        | {"expected_delta_nll": sum(s["expected_loss"] for s in sites) if recipe.grid == "lattice" else None},
        "privacy": privacy,
        "sites": sites,
        "exports": exports,
        "warnings": [*notes, *warnings, *told(exports)],
        "timings": clock.seconds | {f"{step} (CPU)": seconds for step, seconds in cpu.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "solver": solver,
    }

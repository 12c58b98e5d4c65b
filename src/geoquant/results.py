"""Per-stage results on disk: codes, steps and kept columns of the sites that share one input, and what happened.

One safetensors file per stage, written as the stage finishes: a killed run resumes from them, and an export reads
them one site at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from geoquant.lattice.certificate import certificate
from geoquant.lattice.grid import Grid
from geoquant.lattice.order import ALONE
from geoquant.lattice.rate import site_bits, spread_of
from geoquant.lattice.sphere import profile
from geoquant.methods.problem import LatticeSolution, Solution
from geoquant.model.walk import Block, Stage
from geoquant.plan.uniform import SitePlan
from geoquant.runs import read_metadata, read_tensors, write_tensors
from geoquant.solve import StageResult

__all__ = [
    "REFINED",
    "SiteFiles",
    "StageFiles",
    "final_path",
    "load_stage",
    "refined_bits",
    "save_refined",
    "save_stage",
    "site_reports",
    "solved_cost",
    "solved_sites",
    "stage_bits",
    "stage_path",
]

# What is said of a basis and its planes: rounding every weight alone has neither.
BABAI_ONLY = ("bound", "sphere_bound", "gap_db", "headroom_db", "rows_db", "profile")
# Changes codes wherever bits are saved: nothing bounds its error.
UNBOUNDED = "lattice-priced-descent"


PART = 1 << 13
REFINED = "refined"  # folder in a run: the same files with other codes, if codes were refined


def stage_path(run: Path, stage: Stage) -> Path:
    """Where a stage's result lies."""
    return run / "sites" / f"{stage.name}.safetensors"


def final_path(run: Path, stage: Stage) -> Path:
    """Where the codes lie that count in the end: refined ones, if there are any."""
    refined = run / REFINED / f"{stage.name}.safetensors"
    return refined if refined.exists() else stage_path(run, stage)


def save_stage(run: Path, result: StageResult, plans: Mapping[str, SitePlan]) -> None:
    """Write a stage's codes and its report entries."""
    solution, stage = result.solution, result.stage
    tensors, metadata = (_lattice if isinstance(solution, LatticeSolution) else _boxed)(solution)
    metadata |= {
        "damping": repr(solution.damping),
        "sites": json.dumps([{"name": site.name, "rows": site.shape[0]} for site in stage.sites]),
        "report": json.dumps(_entries(result, plans)),
        "warning": result.warning or "",
        "seconds": json.dumps(result.seconds),
    }
    write_tensors(stage_path(run, stage), {name: tensor.cpu() for name, tensor in tensors.items()}, metadata)


def save_refined(folder: Path, run: Path, stage: Stage, solution: Solution | LatticeSolution, moved: float) -> None:
    """Write a solved stage's file once more, with refined codes: sizes are counted again, what is said of errors stays
    that of the solver's codes, and the reason says so. moved: share of the stage's codes."""
    tensors, metadata = read_tensors(stage_path(run, stage))
    entries, start = json.loads(metadata["report"]), 0
    spread = spread_of(solution.codes) if isinstance(solution, LatticeSolution) else None
    for entry, site in zip(entries, stage.sites, strict=True):
        own = solution.rows(start, start + site.shape[0])
        if spread is not None:
            part = spread.part(start, start + site.shape[0])
            bits = site_bits(own.codes, part, site.shape[0] / stage.rows)
            entry |= {"bits_per_weight": bits / math.prod(site.shape), "largest_code": int(own.codes.abs().max())}
        entry |= {"refined": moved, "reason": f"{entry['reason']}; refined afterwards: {moved:.1%} of the codes moved"}
        start += site.shape[0]
    tensors["codes"] = solution.codes.cpu()
    write_tensors(folder / f"{stage.name}.safetensors", tensors, {**metadata, "report": json.dumps(entries)})


def refined_bits(folder: Path, stages: list[Stage]) -> float:
    """Mean bits per weight over the stages whose files lie in a folder."""
    reports = [json.loads(read_metadata(folder / f"{stage.name}.safetensors")["report"]) for stage in stages]
    sites = [site for report in reports for site in report]
    sizes = [math.prod(site["shape"]) for site in sites]
    return sum(size * site["bits_per_weight"] for size, site in zip(sizes, sites, strict=True)) / sum(sizes)


def _boxed(solution: Solution) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of a solution in the box."""
    tensors = {
        "codes": solution.codes,
        "scales": solution.scales,
        "kept_index": solution.kept_index,
        "kept_weight": solution.kept_weight,
        "gram_schmidt": solution.gram_schmidt,
        "saturated": solution.saturated,
    }
    if solution.zero_points is not None:
        tensors["zero_points"] = solution.zero_points
    if solution.column_scores is not None:
        tensors["column_scores"] = solution.column_scores
    grid = solution.grid
    return tensors, {"grid": json.dumps([grid.bits, grid.group_size, grid.symmetric])}


def _lattice(solution: LatticeSolution) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of a point of the unbounded lattice."""
    names = ("codes", "row_exponents", "column_exponents", "gram_schmidt", "row_errors")
    return {name: getattr(solution, name) for name in names}, {"step": repr(solution.step)}


def _solution(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Solution | LatticeSolution:
    if "step" in metadata:
        return LatticeSolution(**tensors, step=float(metadata["step"]), damping=float(metadata["damping"]))
    bits, group_size, symmetric = json.loads(metadata["grid"])
    return Solution(
        codes=tensors["codes"],
        scales=tensors["scales"],
        zero_points=tensors.get("zero_points"),
        kept_index=tensors["kept_index"],
        kept_weight=tensors["kept_weight"],
        damping=float(metadata["damping"]),
        gram_schmidt=tensors["gram_schmidt"],
        saturated=tensors["saturated"],
        grid=Grid(bits, group_size, symmetric),
        column_scores=tensors.get("column_scores"),
    )


def load_stage(run: Path, stage: Stage) -> Solution | LatticeSolution | None:
    """The solution of a stage, refined or not, or None where it was not solved yet."""
    path = final_path(run, stage)
    return _solution(*read_tensors(path)) if path.exists() else None


def solved_cost(run: Path, stage: Stage) -> tuple[float, float] | None:
    """Step and coded bits of a stage of the lattice, or None where it was not solved yet."""
    path = stage_path(run, stage)
    if not path.exists():
        return None
    metadata = read_metadata(path)
    bits = sum(math.prod(site["shape"]) * site["bits_per_weight"] for site in json.loads(metadata["report"]))
    return float(metadata["step"]), bits


def stage_bits(stage: Stage, solution: LatticeSolution) -> list[float]:
    """Coded bits of each of a stage's sites: codes, and the bytes beside them, those of columns shared out by rows."""
    spread, found, start = spread_of(solution.codes), [], 0
    for rows in (site.shape[0] for site in stage.sites):
        part = slice(start, start + rows)
        found.append(site_bits(solution.codes[part], spread.part(part.start, part.stop), rows / stage.rows))
        start += rows
    return found


def solved_sites(run: Path) -> set[str]:
    """Names of the sites that have a result on disk."""
    files = sorted((run / "sites").glob("*.safetensors"))
    return {site["name"] for path in files for site in json.loads(read_metadata(path)["sites"])}


class SiteFiles(Mapping[str, Solution]):
    """Solutions by site name, read from the run folder one stage at a time, in model order."""

    def __init__(self, run: Path, blocks: tuple[Block, ...]):
        self._run = run
        self._stages = {site.name: stage for block in blocks for stage in block.stages for site in stage.sites}
        self._open: tuple[str, Solution] | None = None

    def __getitem__(self, name: str) -> Solution:
        stage = self._stages[name]
        if self._open is None or self._open[0] != stage.name:
            self._open = (stage.name, _solution(*read_tensors(final_path(self._run, stage))))
        start = 0
        for site in stage.sites:
            if site.name == name:
                return self._open[1].rows(start, start + site.shape[0])
            start += site.shape[0]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


class StageFiles(Mapping[str, LatticeSolution]):
    """Solutions by stage name, read from the run folder one at a time, in model order."""

    def __init__(self, run: Path, blocks: tuple[Block, ...]):
        self._run = run
        self._stages = {stage.name: stage for block in blocks for stage in block.stages}

    def __getitem__(self, name: str) -> LatticeSolution:
        return _solution(*read_tensors(final_path(self._run, self._stages[name])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


def _entries(result: StageResult, plans: Mapping[str, SitePlan]) -> list[dict]:
    """The `sites` entries of report.json for one stage."""
    solution, moments = result.solution, result.moments
    metric = moments.hessian if moments.heldout is None else moments.hessian + moments.heldout
    aim = result.original if result.target is None else result.target.weight
    lattice = isinstance(solution, LatticeSolution)
    kept, why = ([], "") if lattice else _kept(solution)
    sizes = stage_bits(result.stage, solution) if lattice else []
    entries, start = [], 0
    if result.warning is not None:
        plans = {site.name: _rounded(plans[site.name], result) for site in result.stage.sites}
    for place, site in enumerate(result.stage.sites):
        part = slice(start, start + site.shape[0])
        start += site.shape[0]
        plan, own = plans[site.name], solution.rows(part.start, part.stop)
        clipped = 0.0 if lattice else own.saturated.mean().item()
        measured = certificate(
            aim[part],
            quantized_parts(own),
            metric,
            moments.heldout,
            own.squares,
            clipped,
        )
        bits = sizes[place] / math.prod(site.shape) if lattice else plan.bits_per_weight
        entries.append(
            {
                "name": site.name,
                "block": site.block,
                "kind": site.kind,
                "shape": list(site.shape),
                "bits": plan.bits,
                "bits_per_weight": bits,
                "method": plan.method,
                "order": plan.order,
                "damping": solution.damping,
                **asdict(measured),
                "profile": dict(zip(("lengths", "steps"), map(profile, own.basis_lengths))),
                "kept": 0 if lattice else solution.kept_index.numel(),
                "kept_columns": kept,
                "massive_tokens": asdict(moments.massive),
                "reason": plan.reason + why,
            }
        )
        if lattice:
            # In the metric of the loss every weight costs half a step's variance.
            loss = math.prod(site.shape) * solution.step**2 / 24
            entries[-1] |= {"step": solution.step, "largest_code": int(own.codes.abs().max()), "expected_loss": loss}
        if result.target is not None:
            entries[-1]["target_strength"] = result.target.strength
        if result.anchored is not None:
            entries[-1]["anchored"] = {name: own[part].sum().item() for name, own in result.anchored.items()}
        if plan.method in ("rtn", "lattice-rtn", "nearest"):
            entries[-1] |= dict.fromkeys(BABAI_ONLY)
        elif plan.method == UNBOUNDED:
            entries[-1]["bound"] = None
    return entries


def quantized_parts(solution: Solution | LatticeSolution) -> Iterator[Tensor]:
    """The solved weights a few thousand rows at a time: an embedding has many."""
    for start in range(0, len(solution.codes), PART):
        yield solution.rows(start, start + PART).dequantize()


def _rounded(plan: SitePlan, result: StageResult) -> SitePlan:
    """What a site got whose stage could not be solved as planned: rounding has no order and keeps no columns."""
    changes = {"method": "rtn", "order": ALONE, "reason": f"planned as {plan.method}, but {result.warning}"}
    if isinstance(result.solution, LatticeSolution):
        return replace(plan, **changes | {"method": "nearest"})
    grid = result.solution.grid
    return replace(plan, **changes, bits=grid.bits, bits_per_weight=grid.bits_per_weight(plan.shape[1]), keep=0.0)


def _kept(solution: Solution) -> tuple[list[int], str]:
    """The kept columns, most important first, and why in numbers: their share of the site's HOP score."""
    if not solution.kept_index.numel() or solution.column_scores is None:
        return [], ""
    scores = solution.column_scores[solution.kept_index]
    total = solution.column_scores.sum().clamp_min(1e-30)
    top = torch.argsort(scores, descending=True)
    columns = solution.kept_index[top].tolist()
    share, first = (scores.sum() / total).item(), (scores[top[0]] / total).item()
    return (
        columns,
        f"; rounding them would cost {share:.1%} of the site's HOP error (column {columns[0]} alone {first:.1%})",
    )


def site_reports(run: Path, blocks: tuple[Block, ...]) -> tuple[list[dict], list[str], dict[str, float]]:
    """Report entries of all sites, warnings, and the CPU seconds spent per step."""
    entries, warnings, seconds = [], [], {}
    for block in blocks:
        for stage in block.stages:
            metadata = read_metadata(final_path(run, stage))
            entries += json.loads(metadata["report"])
            warnings += [metadata["warning"]] if metadata["warning"] else []
            for step, value in json.loads(metadata["seconds"]).items():
                seconds[step] = seconds.get(step, 0.0) + value
    return entries, warnings, seconds

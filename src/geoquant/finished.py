"""What of a run is already there, judged by its files alone: no model is loaded to see that nothing is missing."""

from __future__ import annotations

from pathlib import Path

from geoquant.export import unread
from geoquant.recipe import Recipe
from geoquant.results import solved_sites
from geoquant.runs import read_json

__all__ = ["earlier_exports", "finished_report"]


def finished_report(run: Path, recipe: Recipe) -> dict | None:
    """The report of a run that lacks nothing `recipe` asks for, or None.

    A removed site, a removed export and one that was not verified yet are work to do, as is a run that never ended.
    """
    told = all((run / name).exists() for name in ("report.json", "report.html"))
    if read_json(run / "manifest.json", status=str)["status"] != "done" or not told:
        return None
    exports = earlier_exports(run)
    wanted = [exports.get(name) for name in recipe.formats]
    if not all((*exports.values(), *wanted)) or (recipe.verify and not all(map(settled, wanted))):
        return None
    report = read_json(run / "report.json", sites=list)
    return report if solved_sites(run).issuperset(site["name"] for site in report["sites"]) else None


def settled(entry: dict) -> bool:
    """Whether an export was reloaded, or cannot be for want of a package: then verifying has no more to do."""
    return bool(entry["verified"] or unread(entry["format"]))


def earlier_exports(run: Path) -> dict[str, dict | None]:
    """The report's entry of each format written so far; None where files are gone or a reload found them wrong."""
    if not (run / "report.json").exists():
        return {}
    report = read_json(run / "report.json", exports=list)
    return {entry["format"]: entry if _stands(run, entry) else None for entry in report["exports"]}


def _stands(run: Path, entry: dict) -> bool:
    folders = [run / entry["path"], *([run / "adapter"] if entry["adapter_bytes"] else [])]
    held = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    # More than was written is the user's own addition.
    return held >= entry["bytes"] and (not entry["verified"] or entry["verified"]["ok"])

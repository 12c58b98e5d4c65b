"""The page of a geometry benchmark: leaderboards of predictors, each with its interval."""

from __future__ import annotations

from pathlib import Path

from geoquant.report.page import fingerprint, finite, rendered, write_page

__all__ = ["render", "write_bench"]


def render(found: dict) -> str:
    """The page of what `geoquant.bench` returned."""
    mark, found = fingerprint(found), finite(found)
    return rendered("bench.html.jinja", p=found, fingerprint=mark)


def write_bench(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write bench.json and bench.html, each by rename of a complete file."""
    return write_page(folder, "bench", render(found), found)

"""The page of an identification: labels, effects with their intervals, and how far they can be trusted."""

from __future__ import annotations

from pathlib import Path

from geoquant.report.page import fingerprint, finite, write_page

__all__ = ["render", "write_identity"]


def render(found: dict) -> str:
    """The page of what `geoquant.identify` returned."""
    mark, found = fingerprint(found), finite(found)
    return f"{mark} {len(found)}"


def write_identity(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write identity.json and identity.html, each by rename of a complete file."""
    return write_page(folder, "identity", render(found), found)

"""The page of an audit, for a reviewer to sign: who attacks and how, what was found, what was not tried."""

from __future__ import annotations

from pathlib import Path

from geoquant.report.leakage import leakage
from geoquant.report.page import fingerprint, finite, rendered, write_page
from geoquant.report.words import extraction_total, leak_clause, strongest

__all__ = ["render", "write_audit"]

ROLES = {"base": "Public base", "against": "Compared with", "original": "This model"}


def render(found: dict) -> str:
    """The page of what `geoquant.audit` returned."""
    mark, found = fingerprint(found), finite(found)
    clause = leak_clause(found, "original")
    return rendered(
        "audit.html.jinja",
        headline=f"{found['models']['original']['name']}: {clause}.",
        top=strongest(found, "original"),
        got=extraction_total(found, "original"),
        hashes={ROLES[role].lower(): model["sha256"] for role, model in found["models"].items()},
        fingerprint=mark,
        holder="weights",
        **leakage(found, ROLES),
    )


def write_audit(folder: Path, found: dict) -> tuple[Path, Path]:
    """Write audit.json and audit.html, each by rename of a complete file."""
    return write_page(folder, "audit", render(found), found)

"""The report: one self-contained HTML page and the JSON it was made from."""

from __future__ import annotations

from geoquant.report.build import render, write_report
from geoquant.report.schema import check_schema
from geoquant.report.words import headline

__all__ = ["check_schema", "headline", "render", "write_report"]

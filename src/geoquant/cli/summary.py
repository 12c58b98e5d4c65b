"""The last lines of a run: one table, original against quantized, and where the report lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geoquant.cli.screen import stdout_console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SUBJECTS", "headline_attack", "metrics", "show_summary", "summary_table"]

SUBJECTS = ("original", "quantized")
STORED_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
NONE = "–"


def headline_attack(report: dict) -> str | None:
    """The attack that separates members best on either model; the same one is then shown for both."""
    attacks = [
        attack
        for attack in (report.get("privacy") or {}).get("attacks") or []
        if attack["subject"] in SUBJECTS and attack["auc"] is not None
    ]
    return max(attacks, key=lambda attack: abs(attack["auc"] - 0.5))["name"] if attacks else None


def counted(sites: list[dict]) -> str:
    """The matrices whose bits are counted: embeddings are among them where they were solved."""
    from geoquant.report.words import VOCABULARY

    return "linear layers" + (", embeddings" if any(site.get("kind") in VOCABULARY for site in sites) else "")


def metrics(report: dict, subject: str) -> dict[str, str]:
    """Row label -> what the report says of the original or of the quantized model, ready to print."""
    size, quality, privacy = report["size"], report["quality"][subject], report.get("privacy")
    original = subject == "original"
    bits = STORED_BITS.get(report["model"].get("dtype")) if original else size["bits_per_weight"]
    rows = {
        f"bits per weight ({counted(report['sites'])})": number(bits, 2 if not original else 0),
        "megabytes on disk": number(megabytes(size["original_bytes" if original else "total_bytes"]), 1),
        "perplexity": number(quality["perplexity"], 2) + spread(quality),
    }
    if privacy is None:
        return rows
    name = headline_attack(report)
    if name is not None:
        rows |= attack_rows(privacy, name, subject)
    if privacy.get("no_verdict"):
        rows["verdict on leakage"] = f"none: blind AUC {number(privacy['gate']['auc'], 2)}"
    rows["private spans extracted"] = extraction(privacy, subject)
    rows["canary exposure (bits)"] = exposure(privacy, subject)
    return {label: value for label, value in rows.items() if value is not None}


def attack_rows(privacy: dict, name: str, subject: str) -> dict[str, str]:
    """AUC with its interval and the true positive rate where one non-member in a hundred is accused."""
    found = [a for a in privacy["attacks"] if a["name"] == name and a["subject"] == subject]
    if not found:
        return {f"AUC, {name} attack": NONE, "TPR at 1% FPR": NONE}
    attack = found[0]
    low, high = attack.get("ci") or (None, None)
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    rate = next((value for key, value in attack["tpr_at_fpr"].items() if abs(float(key) - 0.01) < 1e-9), None)
    if isinstance(rate, dict):
        rate = rate.get("tpr", rate.get("value"))
    return {
        f"AUC, {name} attack": number(attack["auc"], 3) + interval,
        "TPR at 1% FPR": percent(rate),
    }


def extraction(privacy: dict, subject: str, how: str = "extraction") -> str | None:
    """Share of marked spans that greedy decoding gave back; None where nobody tried. how: or `prompted`, by name."""
    rows = [row for row in privacy.get(how) or [] if row["subject"] == subject]
    rows = [row for row in rows if row["kind"].lower() in ("all", "total")] or rows
    spans = sum(row["spans"] for row in rows)
    return f"{percent(sum(row['extracted'] for row in rows) / spans)} of {spans}" if spans else None


def exposure(privacy: dict, subject: str) -> str | None:
    """Mean exposure of the canaries, out of what it can be at most."""
    found = [row for row in privacy.get("exposure") or [] if row["subject"] == subject]
    if not found or found[0]["mean_bits"] is None:
        return None
    limit = found[0].get("limit_bits")
    return number(found[0]["mean_bits"], 1) + (f" of {limit:.1f}" if limit else "")


def number(value: float | None, digits: int) -> str:
    """A number with fixed digits, or a dash for a missing measurement."""
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one digit."""
    return NONE if share is None else f"{100 * share:.1f}%"


def megabytes(count: float | None) -> float | None:
    """Bytes in units of a million."""
    return None if count is None else count / 1e6


def spread(quality: dict) -> str:
    """± one standard error of the perplexity, from that of the mean log-likelihood (delta method)."""
    if quality.get("se") is None or quality["perplexity"] is None:
        return ""
    return f" ± {quality['perplexity'] * quality['se']:.2f}"


def columns_table(title: str, headers: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    """Metrics of several subjects side by side; a row that one of them lacks shows a dash there."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for header in headers:
        table.add_column(header, justify="right")
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, NONE) for column in columns))
    return table


def summary_table(report: dict) -> Table:
    """Original against quantized."""
    title = report["model"].get("name") or "summary"
    return columns_table(title, SUBJECTS, [metrics(report, subject) for subject in SUBJECTS])


def show_summary(report: dict, out: Path) -> None:
    """Warnings, the table, and as the very last line the path of the report."""
    from rich.markup import escape

    from geoquant.report.control import control_sentences

    console = stdout_console()
    for warning in report.get("warnings") or []:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    if goal := report.get("goal"):
        console.print(f"[bold]goal[/] {escape(goal['why'])}", soft_wrap=True)
    console.print(summary_table(report))
    for sentence in control_sentences(report):
        console.print(f"[bold]control[/] {escape(sentence)}", soft_wrap=True)
    if guarantee := (report.get("privacy") or {}).get("guarantee"):
        console.print(f"[bold]formal guarantee:[/] {guarantee['sentence']}", soft_wrap=True)
    page = out / "report.html"
    print(f"report: {page if page.exists() else out / 'report.json'}")

"""`geoquant audit`: what do the weights reveal about their training records?"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Device, Json, Model
from geoquant.cli.screen import library, output, progress_display, stdout_console
from geoquant.cli.summary import exposure, extraction, number, percent

__all__ = ["audit"]

# The report compares an original with its quantized twin; here one model is looked at, whatever it is.
NAMES = {"original": "this model", "base": "reference"}


def audit(
    model: Model,
    /,
    *,
    members: Annotated[str, Parameter(help="Records the model was trained on, .jsonl with a text field.")],
    nonmembers: Annotated[str, Parameter(help="Records of the same kind that it never saw, .jsonl.")],
    reference: Annotated[str | None, Parameter(help="Public base model: calibrates the attack.")] = None,
    canaries: Annotated[str | None, Parameter(help="Canaries planted in the training data, .jsonl.")] = None,
    seed: Annotated[int, Parameter(help="Seed of the bootstrap."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Membership attacks with intervals, extraction of marked spans, exposure of canaries.

    Both files must come from the same source, or the attack measures the difference between the files.

    For example:

      geoquant audit MODEL --members in.jsonl --nonmembers out.jsonl
      geoquant audit RUN/model --members in.jsonl --nonmembers out.jsonl --json
    """
    with output(json) as result:
        with progress_display() as progress:
            examine = library("examine", progress)
            found = examine.audit(
                model,
                members,
                nonmembers,
                reference=reference,
                canaries=canaries,
                seed=seed,
                device=device,
                progress=progress,
            )
        result(found, lambda: show(found))


def show(found: dict) -> None:
    """One row per attack, then extraction and exposure of every model that was looked at."""
    from rich.table import Table

    table = Table(title="membership attacks", title_justify="left", title_style="bold")
    rates = list(dict.fromkeys(rate for attack in found["attacks"] for rate in attack["tpr_at_fpr"]))
    for header in ("attack", "model", "AUC", "interval", *(f"TPR at {100 * float(r):g}% FPR" for r in rates)):
        table.add_column(header, justify="left" if header in ("attack", "model") else "right")
    for attack in found["attacks"]:
        low, high = attack.get("ci") or (None, None)
        table.add_row(
            attack["name"],
            NAMES.get(attack["subject"], attack["subject"]),
            number(attack["auc"], 3),
            f"{number(low, 3)} – {number(high, 3)}",
            *(percent(rate_value(attack["tpr_at_fpr"].get(rate))) for rate in rates),
        )
    stdout_console().print(table)
    for subject in dict.fromkeys(attack["subject"] for attack in found["attacks"]):
        seen = {"extracted": extraction(found, subject), "exposure": exposure(found, subject)}
        for label, value in seen.items():
            if value is not None:
                print(f"{NAMES.get(subject, subject)}: {label} {value}")
    for warning in found.get("warnings") or []:
        print(f"warning: {warning}")
    print("no formal guarantee: these are the attacks that were run, not all that exist")


def rate_value(rate: float | dict | None) -> float | None:
    """A rate, with or without its interval."""
    return rate.get("tpr", rate.get("value")) if isinstance(rate, dict) else rate

"""`geoquant audit`: what do the weights reveal about their training records?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, AnyModel, Device, Json, command_line
from geoquant.cli.screen import library, output, progress_display, stdout_console
from geoquant.cli.summary import exposure, extraction, number, percent

__all__ = ["audit"]

# The report compares an original with its quantized twin; here one model is looked at, whatever it is.
NAMES = {"original": "this model", "base": "reference", "against": "the other"}


def audit(
    model: AnyModel,
    /,
    *,
    members: Annotated[str, Parameter(help="Records the model was trained on, .jsonl with a text field.")],
    nonmembers: Annotated[str, Parameter(help="Records of the same kind that it never saw, .jsonl.")],
    reference: Annotated[str | None, Parameter(help="Public base model: calibrates the attack.")] = None,
    against: Annotated[str | None, Parameter(help="Another state of the model, compared record by record.")] = None,
    canaries: Annotated[str | None, Parameter(help="Canaries planted in the training data, .jsonl.")] = None,
    out: Annotated[Path | None, Parameter(help="Folder for audit.json, audit.html and the scores.")] = None,
    train_shadows: Annotated[
        int, Parameter(help="Fine-tunes of the reference on halves of the records; LiRA and RMIA need them."), WHOLE
    ] = 0,
    shadow_epochs: Annotated[int, Parameter(help="Epochs of a shadow: as MODEL was trained."), WHOLE] = 3,
    shadow_lr: Annotated[float, Parameter(help="Peak learning rate of a shadow.")] = 1e-4,
    shadow_batch: Annotated[int, Parameter(help="Records of one step of a shadow."), WHOLE] = 8,
    shadow_lora: Annotated[int, Parameter(help="Rank of a shadow's adapters; 0: all weights learn."), WHOLE] = 0,
    seed: Annotated[int, Parameter(help="Seed of intervals, permutations and shadows."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Membership attacks with intervals, extraction of marked spans, exposure of canaries.

    Both files must come from one source, or the attack measures their difference.
    Where texts alone tell them apart, no verdict is given.

    For example:

      geoquant audit MODEL --members in.jsonl --nonmembers out.jsonl
      geoquant audit TUNED --members in.jsonl --nonmembers out.jsonl --reference BASE --out AUDIT
      geoquant audit TUNED --members in.jsonl --nonmembers out.jsonl --reference BASE --out AUDIT --train-shadows 8
      geoquant audit RUN --members in.jsonl --nonmembers out.jsonl --against TUNED --json
    """
    with output(json) as result:
        with progress_display() as progress:
            auditing = library("auditing", progress)
            found = auditing.audit(
                model,
                members,
                nonmembers,
                reference=reference,
                against=against,
                canaries=canaries,
                out=out,
                seed=seed,
                device=device,
                train_shadows=train_shadows,
                shadow_settings=auditing.ShadowSettings(shadow_epochs, shadow_lr, shadow_batch, shadow_lora, seed),
                progress=progress,
                command=command_line(),
            )
        result(found, lambda: show(found, out))


def show(found: dict, out: Path | None = None) -> None:
    """Whether the records allow a verdict, one row per attack, changes, extraction and exposure of every model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from geoquant.report.words import p_value

    if refusal := found.get("no_verdict"):
        print(f"NO VERDICT: {refusal}")
    elif gate := found.get("gate"):
        print(
            f"records: without any model, AUC {number(gate['auc'], 2)} "
            f"({number(gate['ci'][0], 2)} – {number(gate['ci'][1], 2)}); {number(gate['alarm'], 2)} would be an alarm"
        )
    # Without lines between the columns eight of them fit into 80 characters.
    table = Table(title="membership attacks", title_justify="left", title_style="bold")
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    rates = list(dict.fromkeys(rate for attack in found["attacks"] for rate in attack["tpr_at_fpr"]))
    tested = any(attack.get("p_holm") is not None for attack in found["attacks"])
    caught = (f"{'' if place else 'TPR '}{100 * float(rate):g}%" for place, rate in enumerate(rates))
    for header in ("attack", "model", "AUC", "interval", *(("p",) if tested else ()), *caught):
        table.add_column(header, justify="left" if header in ("attack", "model") else "right")
    for attack in found["attacks"]:
        low, high = attack.get("ci") or (None, None)
        table.add_row(
            attack["name"],
            NAMES.get(attack["subject"], attack["subject"]),
            number(attack["auc"], 3),
            f"{number(low, 3)}–{number(high, 3)}",
            *((p_value(attack.get("p_holm")),) if tested else ()),
            *(percent(rate_value(attack["tpr_at_fpr"].get(rate))) for rate in rates),
        )
    stdout_console().print(table)
    if tested:
        print("p: of both sides scoring alike, corrected over attacks; TPR: at these false positive rates")
    show_changes(found.get("comparisons") or [])
    for subject in dict.fromkeys(attack["subject"] for attack in found["attacks"]):
        seen = {
            "extracted": extraction(found, subject),
            "extracted by name": extraction(found, subject, "prompted"),
            "exposure": exposure(found, subject),
        }
        for label, value in seen.items():
            if value is not None:
                print(f"{NAMES.get(subject, subject)}: {label} {value}")
    if shadows := found.get("shadows"):
        remembered = ", ".join(number(model["auc"], 2) for model in shadows["models"])
        print(f"shadow models: AUC on their own halves {remembered}")
    for bound in found.get("one_run") or []:
        print(f"{NAMES.get(bound['subject'], bound['subject'])}: {one_run(bound)}")
    for verdict in found.get("verdict") or []:
        print(f"{NAMES.get(verdict['subject'], verdict['subject'])}: {sentence(verdict, found)}")
    for warning in found.get("warnings") or []:
        print(f"warning: {warning}")
    print("no formal guarantee: these are the attacks that were run, not all that exist")
    if out is not None:
        print(f"for a reviewer: {out / 'audit.html'}")


def show_changes(comparisons: list[dict]) -> None:
    """The attack whose AUC changed most from each model to the next; the others are in --json."""
    from geoquant.report.words import p_value

    for pair in dict.fromkeys((row["from"], row["to"]) for row in comparisons):
        rows = [row for row in comparisons if (row["from"], row["to"]) == pair]
        most = max(rows, key=lambda row: abs(row["difference"]))
        before, after = (NAMES.get(name, name) for name in pair)
        print(
            f"{before} to {after}: AUC of {most['attack']} {most['difference']:+.3f} "
            f"({most['ci'][0]:+.3f} – {most['ci'][1]:+.3f}), p {p_value(most['p_holm'])}, "
            f"the largest change of {len(rows)} attack{'s' if len(rows) > 1 else ''}"
        )


def one_run(bound: dict) -> str:
    """The one-run audit in a line, with what it is about."""
    return (
        f"epsilon at least {bound['epsilon']:.2f} at delta {bound['delta']:g} with {100 * bound['confidence']:g}% "
        f"confidence (one canary in or out; {bound['correct']} of {bound['guesses']} guesses right; {bound['m']} "
        f"canaries can show {bound['most']:.2f} at most): a lower bound, never an upper one"
    )


def sentence(verdict: dict, found: dict) -> str:
    """What the verdict on one model says, no more than was tested, and on how many records."""
    if verdict["separates"]:
        return f"members are told apart (attack {verdict['attack']})"
    records = f"{found['n_members']} members and {found['n_nonmembers']} non-members"
    return f"no attack tried tells members apart at level {verdict['level']:g}, by {records}; others may"


def rate_value(rate: float | dict | None) -> float | None:
    """A rate, with or without its interval."""
    return rate.get("tpr", rate.get("value")) if isinstance(rate, dict) else rate

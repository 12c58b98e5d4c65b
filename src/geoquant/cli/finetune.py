"""`geoquant finetune`: train a model on records, so that there is something to audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Device, Json, Model, command_line
from geoquant.cli.screen import library, output, progress_display

__all__ = ["finetune"]


def finetune(
    model: Model,
    /,
    *,
    records: Annotated[
        list[str], Parameter(help="Records to train on, .jsonl; repeatable. A canary counts as often as it repeats.")
    ],
    out: Annotated[Path, Parameter(help="Folder for the fine-tuned model: new, or of the same training interrupted.")],
    epochs: Annotated[int, Parameter(help="Passes over the records, at most."), WHOLE] = 3,
    lr: Annotated[float, Parameter(help="Learning rate at its peak.")] = 1e-4,
    batch: Annotated[int, Parameter(help="Records of one step."), WHOLE] = 8,
    lora: Annotated[int, Parameter(help="Rank of adapters, merged in the end; 0: all weights learn."), WHOLE] = 0,
    nonmembers: Annotated[
        str | None, Parameter(help="Records of the same kind that are not trained on: try an attack with them.")
    ] = None,
    until_auc: Annotated[
        float | None, Parameter(help="Stop when the attack, tried every 10 steps, has this AUC.")
    ] = None,
    seed: Annotated[int, Parameter(help="Seed of order, adapters and dropout."), WHOLE] = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Fine-tune a model on records: a plain training run that can be repeated, to have something to audit.

    The learning rate rises over a tenth of the steps and falls to zero at the last epoch. The attack is the reference
    attack with MODEL as the reference, on up to 200 records a side. After an interruption the same command goes on.

    For example:

      geoquant finetune MODEL --records RECORDS/members.jsonl --records RECORDS/canaries.jsonl --out TUNED
      geoquant finetune MODEL --records in.jsonl --nonmembers out.jsonl --until-auc 0.7 --lora 8 --out MILD
    """
    with output(json) as result:
        with progress_display() as progress:
            finetuning = library("finetuning", progress)
            statement = finetuning.finetune(
                model,
                records,
                out,
                nonmembers=nonmembers,
                until_auc=until_auc,
                epochs=epochs,
                lr=lr,
                batch=batch,
                lora=lora,
                seed=seed,
                device=device,
                progress=progress,
                command=command_line(),
            )
        result(statement, lambda: show(statement, out))


def show(statement: dict, out: Path) -> None:
    """Steps, what the attack found, and where the model lies."""
    if statement["reached"] is False:
        print(f"warning: AUC {statement['settings']['until_auc']:g} was not reached; more --epochs or a higher --lr")
    print(f"trained {statement['steps']} of {statement['planned']} steps")
    if (attack := statement["attack"]) is not None:
        low, high = attack["ci"]
        print(
            f"reference attack: AUC {attack['auc']:.3f} ({low:.3f} – {high:.3f}) "
            f"on {attack['members']} + {attack['nonmembers']} records"
        )
    print(f"model: {out}")

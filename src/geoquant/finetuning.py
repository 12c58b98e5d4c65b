"""Fine-tune a model on records into a folder, with a statement by which whoever audits it can repeat it.

    OUT/
      config.json, model.safetensors, tokenizer files   an ordinary Hugging Face folder, in the type of MODEL
      statement.json           hashes of what went in and came out, settings, versions, how well an attack does

While training lasts, OUT holds `training.safetensors`, the state to go on from.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from geoquant.data.folder import STATEMENT
from geoquant.data.records import Record, read_records
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.export.dense import export_dense
from geoquant.manifest import versions
from geoquant.model.load import Loaded, identity, load
from geoquant.privacy import finetune as training
from geoquant.privacy.probe import PROBED, Probed, probe
from geoquant.progress import Progress, silent
from geoquant.runs import PARTIAL, atomic_directory, check_writable, file_hash, read_json, write_json

__all__ = ["REGIMES", "STATE", "Regime", "finetune", "teach_regimes"]

STATE = "training.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class Regime:
    """How much a model memorised: the AUC of the reference attack lies in [low, high]."""

    name: str
    low: float
    high: float

    @property
    def aim(self) -> float:
        """Training has arrived at the first step that is looked at and reaches the middle."""
        return (self.low + self.high) / 2

    def holds(self, auc: float) -> bool:
        """Whether an AUC lies within."""
        return self.low <= auc <= self.high


REGIMES = (Regime("mild", 0.6, 0.75), Regime("strong", 0.8, 0.95), Regime("extreme", 0.99, 1.0))


def finetune(
    model: str,
    records: Sequence[str | Path],
    out: str | Path,
    *,
    nonmembers: str | Path | None = None,
    until_auc: float | None = None,
    epochs: int,
    lr: float,
    batch: int = 8,
    lora: int = 0,
    seed: int = 0,
    device: str = "cpu",
    check_every: int = 10,
    checkpoint_every: int = 100,
    progress: Progress = silent,
    command: str | None = None,
) -> dict:
    """Train `model` on the records of all files and write it to `out`; returns the statement.

    With `nonmembers` the reference attack is tried when training ends and, with `until_auc`, every `check_every` steps:
    training ends at the first that reaches it. An interrupted training goes on by the same call, to the same bits.

    Raises UserError for what privacy/finetune.py refuses, a target without non-members, and a folder that holds
    something else.
    """
    out = Path(out)
    if until_auc is not None and nonmembers is None:
        raise UserError(
            "an attack compares members with non-members", got=f"--until-auc {until_auc:g}", fix="add --nonmembers FILE"
        )
    if until_auc is not None and not 0.5 < until_auc <= 1:
        raise UserError(f"cannot train until an AUC of {until_auc:g}", wanted="more than 0.5 and at most 1")
    claim(out)
    train = [record for path in records for record in read_records(path)]
    others = read_records(nonmembers) if nonmembers is not None else None
    loaded = load(model, device=device)
    loaded.model.requires_grad_(True)
    settings = {"epochs": epochs, "lr": lr, "batch": batch, "lora": lora, "seed": seed}
    look = probe(loaded.model, loaded.tokenizer, train, others, seed=seed) if others is not None else None
    last: list[Probed] = []

    def stop(step: int) -> bool:
        last[:] = [look()]
        progress("attack", 0, 0, f"AUC {last[0].auc:.3f} after step {step}")
        return until_auc is not None and last[0].auc >= until_auc

    done = training.finetune(
        loaded.model,
        loaded.tokenizer,
        train,
        **settings,
        checkpoint=out / STATE,
        checkpoint_every=checkpoint_every,
        stop=stop if look else None,
        stop_every=check_every if until_auc is not None else 1 << 62,  # without an aim only after the last step
        progress=progress,
    )
    facts = {
        "records": [file_facts(path) for path in records],
        "nonmembers": file_facts(nonmembers) if nonmembers is not None else None,
        "settings": settings | {"until_auc": until_auc, "check_every": check_every if until_auc else None},
        "attack": last[0].to_dict() if last else None,
        "reached": None if until_auc is None else last[0].auc >= until_auc,
        "command": command,
    }
    return save(loaded, out, done.steps, done.planned, facts)


def teach_regimes(
    loaded: Loaded,
    records: Sequence[Record],
    members: Sequence[Record],
    nonmembers: Sequence[Record],
    out: str | Path,
    *,
    epochs: int,
    lr: float,
    batch: int = 8,
    lora: int = 0,
    seed: int = 0,
    public_windows: Windows | None = None,
    regimes: Sequence[Regime] = REGIMES,
    check_every: int = 4,
    checkpoint_every: int = 50,
    most: int = PROBED,
    progress: Progress = silent,
) -> dict[str, dict]:
    """One training on `records` that leaves a model in `out`/NAME when it first arrives at each regime.

    Returns the statement of each that was reached; `reached` in it says whether the AUC found there lies in the
    regime's window, which a training that moves fast between two looks can jump over. Ends when all are reached. An
    interrupted call goes on by the same call. Changes `loaded.model`. most: records of a side that a look takes.
    """
    out = Path(out)
    settings = {"epochs": epochs, "lr": lr, "batch": batch, "lora": lora, "seed": seed}
    settings |= {"check_every": check_every, "most": most}
    known = {r.name: read_json(out / r.name / STATEMENT) for r in regimes if (out / r.name / STATEMENT).exists()}
    for name, statement in known.items():
        if statement["settings"] != settings or statement["model"]["sha256"] != loaded.sha256:
            raise UserError(
                f"{out / name} was made with other settings or from another model", fix="choose a new folder"
            )
    if len(known) == len(regimes):
        return known
    loaded.model.requires_grad_(True)
    look = probe(loaded.model, loaded.tokenizer, members, nonmembers, most=most, seed=seed)

    def stop(step: int) -> bool:
        found = look()
        progress("attack", 0, 0, f"AUC {found.auc:.3f} after step {step}")
        for regime in regimes:
            if regime.name not in known and found.auc >= regime.aim:
                facts = {"settings": settings, "attack": found.to_dict(), "reached": regime.holds(found.auc)}
                known[regime.name] = save(loaded, out / regime.name, step, None, facts)
        return len(known) == len(regimes)

    training.finetune(
        loaded.model,
        loaded.tokenizer,
        records,
        epochs=epochs,
        lr=lr,
        batch=batch,
        lora=lora,
        seed=seed,
        public_windows=public_windows,
        checkpoint=out / STATE,
        checkpoint_every=checkpoint_every,
        stop=stop,
        stop_every=check_every,
        progress=progress,
    )
    (out / STATE).unlink(missing_ok=True)
    return known


def claim(out: Path) -> None:
    """Raise UserError unless `out` is new, empty, or holds an interrupted training."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", wanted="a folder")
    held = {path.name for path in out.iterdir() if not path.name.startswith(PARTIAL)} if out.exists() else set()
    if STATEMENT in held:
        raise UserError(f"output folder {out} already holds a fine-tuned model", fix="choose a new folder")
    if held - {STATE}:
        raise UserError(f"output folder {out} is not empty", fix="choose a new folder")
    check_writable(out)


def file_facts(path: str | Path) -> dict:
    """Name and hash of a file of records."""
    return {"file": Path(path).name, "sha256": file_hash(Path(path))}


def save(loaded: Loaded, out: Path, steps: int, planned: int | None, facts: dict) -> dict:
    """Write the model as it is now and its statement, both or neither; returns the statement."""
    with atomic_directory(out) as folder:
        export_dense(loaded.model, loaded.tokenizer, folder)
        statement = {
            "schema": SCHEMA,
            "model": {"name": loaded.name, "sha256": loaded.sha256},
            "result": {"sha256": identity(str(folder), {})},
            "steps": steps,
            "planned": planned,
            "threads": torch.get_num_threads(),
            "device": loaded.model.device.type,
            "versions": versions(),
            **facts,
        }
        write_json(folder / STATEMENT, statement)
    gc.collect()
    return statement

"""The compression-privacy curve: what a fine-tuned model reveals, and what is left of that at 8, 4, 3 and 2.5 bits.

    python benchmarks/privacy_curve.py OUT                       # everything; a killed run goes on by the same command
    python benchmarks/privacy_curve.py OUT --only regime=mild --points original babai-4
    python benchmarks/privacy_curve.py OUT --table               # what is there so far, as markdown
    python benchmarks/privacy_curve.py OUT --figure curve.svg

Models: SmolLM2-135M, fine-tuned once on made medical records (members and planted canaries) and saved on the way in
three regimes by the AUC of the reference attack: mild (0.6-0.75), strong (0.8-0.95), extreme (0.99 or more); and once
on code of Python's standard library, split by file, saved in the strong regime. Of each: the base before, the original,
and its linear layers at 8, 4 and 3 bits in boxes of 64 columns by Babai and by rounding (box-codes of 2.5 bits do not
exist), and on the entropy-coded lattice at 8, 4, 3 and 2.5 bits; at 4 and 3 bits also rounded to the lattice's nearest
codes (`rounded`), and once more at 3 bits with the embeddings on the lattice too.
Every solver gets the same short calibration, so perplexities are worse than those of docs/results.md.

One line a point is added to OUT/points.jsonl; points that are there are skipped. OUT/models keeps the models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from geoquant import pipeline
from geoquant.cli.screen import Lines
from geoquant.control import exposure_row
from geoquant.data.records import Split
from geoquant.data.stdlib import stdlib_records
from geoquant.data.synthetic import MadeRecords, synthetic_records
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import Perplexity, difference, perplexity
from geoquant.export.dense import export_dense
from geoquant.finetuning import REGIMES, Regime, teach_regimes
from geoquant.manifest import versions
from geoquant.measure import builtin_tail
from geoquant.model.load import Loaded, load
from geoquant.privacy.attacks import membership_scores
from geoquant.privacy.audit import Audit, audit
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.evidence import gather
from geoquant.privacy.exposure import exposure
from geoquant.privacy.extraction import Extraction
from geoquant.privacy.probe import mean_log_prob
from geoquant.privacy.scores import SplitScores, load_scores, save_scores
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import holm
from geoquant.progress import Progress
from geoquant.recipe import checked
from geoquant.runs import atomic_write, read_json, write_json
from privacy_claims import PRIMARY

RATE = "0.1"  # the false positive rate of the table

DATA: dict[str, Callable[[], MadeRecords]] = {
    "medical": lambda: synthetic_records("medical", 250, seed=0, canaries=32, repeats=(1, 4)),
    "code": lambda: stdlib_records(250, seed=0, characters=400, canaries=32),
}
# Slow on purpose: the AUC must not jump over a window between two looks.
TAUGHT = {"epochs": 12, "lr": 2e-4, "batch": 8, "check_every": 8, "checkpoint_every": 24, "most": 60}
TRAINING = {"medical": TAUGHT, "code": TAUGHT}
STRONG = next(regime for regime in REGIMES if regime.name == "strong")
LEARNED: dict[str, tuple[str, Regime]] = {
    **{regime.name: ("medical", regime) for regime in REGIMES},
    "code": ("code", STRONG),
}
POINTS: dict[str, dict | None] = {
    "base": None,
    "original": None,
    **{f"{method}-{bits}": {"bits": bits, "method": method} for method in ("babai", "rtn") for bits in (8, 4, 3)},
    **{f"lattice-{rate:g}": {"rate": rate, "embeddings": False} for rate in (8.0, 4.0, 3.0, 2.5)},
    **{f"rounded-{b}": {"rate": b, "method": "lattice-rtn", "row_block": 1, "embeddings": False} for b in (4, 3)},
    "lattice-3-embeddings": {"rate": 3.0},
}
CALIBRATION = {"windows": 16, "window": 256, "gradient_share": 0.25, "target": "weights"}
PUBLIC = (256, 24)  # tokens of a window, windows


@dataclass(frozen=True)
class Measured:
    """What is kept of a model for its row and for comparisons with others on the same records."""

    scores: SplitScores
    public: Perplexity
    domain: Perplexity  # a window here is a held-out record


@cache
def made(data: str) -> MadeRecords:
    """The records of a data set."""
    return DATA[data]()


# ---- the models


def base(out: Path, model: str) -> Path:
    """The public base in bfloat16, written once."""
    folder = out / "models" / "base"
    if not folder.exists():
        loaded = load(model, dtype=torch.float32)
        export_dense(loaded.model, loaded.tokenizer, folder, dtype=torch.bfloat16)
    return folder


def original(out: Path, regime: str, progress: Progress) -> Path:
    """The fine-tuned model of a regime; all regimes of its data come from one training."""
    data, wanted = LEARNED[regime]
    folder = out / "models" / data / wanted.name
    if not folder.exists():
        records = made(data)
        teach_regimes(
            load(str(out / "models" / "base")),
            (*records.members, *records.split.canaries),
            records.members,
            records.nonmembers,
            folder.parent,
            regimes=[regime for name, regime in LEARNED.values() if name == data],
            progress=progress,
            **TRAINING[data],
        )
    if not folder.exists():
        raise UserError(f"training on {data} ended before the regime {regime}", fix="more epochs in TRAINING")
    return folder


# ---- one point


def measure(loaded: Loaded, data: str, progress: Progress) -> Measured:
    """Score every record and both texts."""
    model, tokenizer, records = loaded.model, loaded.tokenizer, made(data)
    split = records.split
    sides = {name: getattr(split, name) for name in ("members", "nonmembers", "canaries", "withheld")}
    scores = {
        name: score_records(model, tokenizer, side, progress=named(progress, f"score {name}"))
        for name, side in sides.items()
        if side
    }
    text = builtin_tail(tokenizer, *PUBLIC)
    held = -mean_log_prob(model, tokenizer, records.holdout)
    mean, error = float(held.mean()), float(held.std(ddof=1) / len(held) ** 0.5)
    domain = Perplexity(float(np.exp(min(mean, 700))), mean, error, 0, tuple(held.tolist()))
    return Measured(SplitScores(**scores), perplexity(model, text, progress=progress), domain)


def named(progress: Progress, phase: str) -> Progress:
    """The same progress under another name."""
    return lambda _, done, total, note="": progress(phase, done, total, note)


def remembered(folder: Path, data: str, subject: Callable[[], Loaded], progress: Progress) -> Measured:
    """The measurement in `folder`, made of `subject()` and written there where it is missing."""
    split = made(data).split
    if not (folder / "losses.json").exists():
        found = measure(subject(), data, progress)
        save_scores(folder / "scores.safetensors", found.scores, split)
        write_json(folder / "losses.json", {"public": found.public.to_dict(), "domain": found.domain.to_dict()})
    losses = read_json(folder / "losses.json")
    texts = (Perplexity(**{**losses[name], "windows": tuple(losses[name]["windows"])}) for name in ("public", "domain"))
    return Measured(load_scores(folder / "scores.safetensors", split), *texts)


def row_of(data: str, found: Measured, before: Measured | None, reference: Measured | None) -> dict:
    """The figures of one point. before: the original; None for itself and the base, which have nothing to compare."""
    split = made(data).split
    now = audit("point", found.scores, reference and reference.scores, split)
    own = {attack.name: attack.scores for attack in now.attacks}
    return {
        "perplexity": found.public.perplexity,
        "nll": found.public.nll,
        "se": found.public.se,
        "delta_nll": difference(before.public, found.public) if before else None,
        "domain_nll": found.domain.nll,
        "domain_se": found.domain.se,
        "domain_delta": difference(before.domain, found.domain) if before else None,
        "attacks": attacks(now, membership(split, before, reference) if before else None),
        "scores": {PRIMARY: [[float(f"{x:.5g}") for x in side] for side in own[PRIMARY]]} if PRIMARY in own else {},
        "extraction": {part.kind: leaked(part) for _, part in now.extraction},
        "continued": {str(part.prefix): leaked(part.found) for _, part in now.suffixes},
        "exposure": secrets(now, found, split),
        "epsilon": next((bound.epsilon for _, bound in now.one_run), None),
    }


def membership(split: Split, target: Measured, reference: Measured) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of every single attack on both sides."""
    sides = ("members", "nonmembers")
    parts = ((getattr(of, side) for of in (split, target.scores, reference.scores)) for side in sides)
    return membership_scores(*(gather(*part) for part in parts))


def attacks(now: Audit, then: dict | None) -> dict[str, dict]:
    """Every attack with its intervals and, paired by record, its change since the original, whose scores are `then`.

    The combination is fitted to the records: DeLong's paired test is not for it.
    """
    rows = {}
    for attack in now.attacks:
        caught = attack.tpr_at_fpr[RATE]
        ci = None if caught.ci is None else list(caught.ci)
        rows[attack.name] = {"auc": attack.auc, "ci": list(attack.ci_delong), "tpr": caught.tpr, "tpr_ci": ci}
    if then is not None:
        changes = {a.name: paired_difference(then[a.name], a.scores) for a in now.attacks if a.name in then}
        for (name, change), p in zip(changes.items(), holm([c.p for c in changes.values()]), strict=True):
            rows[name]["change"] = {"value": change.value, "ci": list(change.ci), "p": change.p, "p_holm": p}
    return rows


def leaked(part: Extraction) -> dict:
    """Texts written out by greedy decoding, and among 100 samples, of members and of non-members."""
    return {
        "spans": part.spans,
        "extracted": part.extracted,
        "ci": list(part.ci),
        "in_100": part.sampled["100"],
        "control_spans": part.control_spans,
        "control_extracted": part.control_extracted,
        "control_in_100": part.control_sampled["100"],
    }


def secrets(now: Audit, found: Measured, split: Split) -> dict | None:
    """Mean exposure of the planted canaries with its standard error, and of those left out, which is the control."""
    if not now.exposure:
        return None
    planted = now.exposure[0][1]
    bits = [canary.bits for canary in planted.canaries]
    control = exposure(found.scores.withheld, split.withheld) if found.scores.withheld else None
    row = exposure_row(bits, planted.limit_bits, control and control.mean_bits)
    return {**row, "estimator": planted.estimator}


def compressed(
    run: Path, model: Path, overrides: dict, progress: Progress, shared: Path | None = None
) -> tuple[Loaded, dict]:
    """The model through the library's own `quantize`, as ordinary weights, and its sizes. shared: as there."""
    recipe = checked(
        {
            "model": str(model),
            **CALIBRATION,
            **overrides,
            "formats": ("dense",),
            "verify": False,
            "evaluation_windows": 2,
        }
    )
    report = pipeline.quantize(
        recipe,
        run,
        resume=(run / "manifest.json").exists(),
        shared=shared,
        progress=progress,
        command="benchmarks/privacy_curve.py",
    )
    return load(str(run / "dense")), report["size"]


def point(out: Path, regime: str, name: str, progress: Progress) -> dict:
    """Make and measure one point."""
    started = time.perf_counter()
    data = LEARNED[regime][0]
    models, kept = out / "models", out / "measured"
    public = remembered(kept / f"{data}-base", data, lambda: load(str(models / "base")), progress)
    row = {"regime": regime, "data": data, "point": name, "bits_per_weight": 16.0}
    if name == "base":
        row |= row_of(data, public, None, None)
    else:
        model = original(out, regime, progress)
        first = remembered(kept / f"{regime}-original", data, lambda: load(str(model)), progress)
        row["finetune"] = {key: read_json(model / "statement.json")[key] for key in ("steps", "attack", "reached")}
        if name == "original":
            row |= row_of(data, first, None, public)
        else:
            run = out / "runs" / f"{regime}-{name}"
            loaded, size = compressed(run, model, POINTS[name], progress)
            found = measure(loaded, data, progress)
            row |= {"bits_per_weight": size["bits_per_weight"]} | row_of(data, found, first, public)
            del loaded
            shutil.rmtree(run)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["threads"] = torch.get_num_threads()
    row["versions"] = {key: versions()[key] for key in ("geoquant", "torch", "transformers")}
    return row


# ---- all of them


def settings(model: str) -> dict:
    """What must not change from one session to the next in one folder."""
    return json.loads(json.dumps({"model": model, "training": TRAINING, "calibration": CALIBRATION, "public": PUBLIC}))


def read_rows(path: Path) -> list[dict]:
    """The points that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_row(path: Path, row: dict) -> None:
    """Append a line; a reader sees all of it or nothing."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    text = old + json.dumps(row, allow_nan=False) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)


def chosen(only: Sequence[str], points: Sequence[str] | None, there: Sequence[dict]) -> list[tuple[str, str]]:
    """(regime, point) of what is asked for and not there yet."""
    facts = {
        (regime, name): {"regime": regime, "data": data, "solver": name.partition("-")[0]}
        for regime, (data, _) in LEARNED.items()
        for name in POINTS
    }
    done = {(row["regime"], row["point"]) for row in there}
    wanted = [one.partition("=")[::2] for one in only]
    for key, value in wanted:
        if not any(fact.get(key) == value for fact in facts.values()):
            raise SystemExit(f"nothing has {key} = {value}; regimes: {', '.join(LEARNED)}")
    if unknown := set(points or ()) - set(POINTS):
        raise SystemExit(f"no such points: {', '.join(sorted(unknown))}; there are {', '.join(POINTS)}")
    return [
        pair
        for pair, fact in facts.items()
        if pair not in done and (not points or pair[1] in points) and all(fact[k] == v for k, v in wanted)
    ]


def main() -> None:
    """Make points, or show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo", help="the public base")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE", help="regime=, data= or solver=")
    parser.add_argument("--points", nargs="*", help=", ".join(POINTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    path = arguments.out / "points.jsonl"
    if arguments.table or arguments.figure:
        from privacy_table import draw, show

        rows = read_rows(path)
        if arguments.table:
            show(rows)
        if arguments.figure:
            draw(rows, arguments.figure)
        return
    torch.set_num_threads(arguments.threads)
    known = arguments.out / "settings.json"
    if known.exists() and read_json(known) != settings(arguments.model):
        raise SystemExit(f"{arguments.out} was begun with other settings; choose another folder")
    write_json(known, settings(arguments.model))
    base(arguments.out, arguments.model)
    missed: dict[str, UserError] = {}
    for regime, name in chosen(arguments.only, arguments.points, read_rows(path)):
        if regime in missed:
            continue
        try:
            row = point(arguments.out, regime, name, Lines(sys.stderr))
        except UserError as error:  # the other regimes can still be measured
            missed[regime] = error
            continue
        add_row(path, row)
        auc = row["attacks"].get("reference", {}).get("auc")
        print(regime, name, f"perplexity {row['perplexity']:.2f}", f"AUC {auc}", f"{row['seconds']} s", flush=True)
    if missed:
        raise SystemExit("\n".join(f"{regime}: {error}" for regime, error in missed.items()))


if __name__ == "__main__":
    main()

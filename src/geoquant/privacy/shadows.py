"""Shadow models: what would a model have scored that saw this record, and what one that did not?

Each is a fine-tune of the public base on one half of the records that are audited, members and non-members in one
pool. Who audits knows both sides, and so knows more than most attackers: what he finds is an estimate from above of
what they would. Each record, of either side, is in exactly models // 2 of the halves (`lira.halves`), so nothing tells
the sides apart but the target itself. Scores are kept, weights are not: one model is in memory at any time, and a
shadow costs one fine-tune and one pass over the records.

**The recipe must be the target's**: epochs, learning rate, batch, full or LoRA, the other texts. Shadows that remember
more or less than the target put the two levels that LiRA compares in the wrong place, and how strongly a record is
remembered is then a guess. Three things are made alike here:
- the size: a half of the pool is as many records as the target saw where the sides are equally large;
- planted canaries are in every shadow, as they were in the target: what is known to be there is no secret;
- records of one side that nearly repeat one another (privacy/duplicates.py) fall on the same side of every half. They
  were in the target together or not at all; dealt out one by one, the models that did not see a record would know it
  from its twin, and just what is remembered best would not stand out. Pairs across the sides are left to chance (the
  target saw one and not the other); the gate names them.

**Compressed targets** are measured against shadows that are not compressed. What rounding does to all records alike
cancels; an attacker who compresses his shadows as well knows a little more.

**Whether a shadow is worth anything** is measured: how well its score, less the mean score under the other shadows that
did not see the record, tells its own half from the other (`Shadow.auc`; of two shadows one is measured against the
other, so that both memories count). A shadow that remembers nothing tells nothing.

Shokri, Stronati, Song, Shmatikov: Membership Inference Attacks Against Machine Learning Models, S&P 2017
(arXiv:1610.05820); halves of one pool: Carlini et al., S&P 2022 (arXiv:2112.03570).
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from geoquant.data.records import Record, Split
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.model.load import Loaded
from geoquant.privacy.attacks import loss
from geoquant.privacy.attacks.lira import halves
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.duplicates import near_duplicates
from geoquant.privacy.evidence import Evidence, ShadowScores
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import auc
from geoquant.progress import Progress, silent
from geoquant.runs import read_tensors, write_tensors

__all__ = ["Shadow", "ShadowSettings", "Shadows", "tied", "train_shadows"]

FORMAT = 1  # of the files; another one when the same settings come to mean another training


@dataclass(frozen=True)
class ShadowSettings:
    """How a shadow is trained: as the target was (see privacy/finetune.py).

    lora: rank of the adapters, 0 for all weights. seed: of the halves; each shadow's own training seed follows from it
    and its number.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    batch: int = 8
    lora: int = 0
    seed: int = 0

    def check(self, models: int) -> None:
        """Raise UserError for what no `models` shadows can be trained with: at once, not after all scores are made."""
        if models < 2:
            raise UserError(
                "each record needs a shadow model that saw it and one that did not", got=models, wanted=">= 2"
            )
        for name, value, least in (("epochs", self.epochs, 1), ("batch", self.batch, 1), ("lora", self.lora, 0)):
            if value < least:
                raise UserError(f"cannot train shadows with {name} = {value}", wanted=f"a whole number from {least}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(
                f"cannot train shadows with a learning rate of {self.learning_rate}", wanted="a positive number"
            )


@dataclass(frozen=True)
class Shadow:
    """What one shadow remembers: AUC and DeLong interval of its own half against the other, by what others score."""

    records: int
    auc: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class Shadows:
    """Scores of both sides under all shadow models, and what each of them remembers of its own half."""

    members: ShadowScores
    nonmembers: ShadowScores
    models: tuple[Shadow, ...]
    settings: ShadowSettings
    base: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """Which shadows tell nothing, in words for the report."""
        weak = [str(number) for number, model in enumerate(self.models, 1) if model.ci[0] <= 0.5]
        if not weak:
            return ()
        return (
            f"shadow model {', '.join(weak)} of {len(self.models)} does not remember its own records: LiRA and RMIA "
            "see less than they could; train shadows as the audited model was trained",
        )

    def to_dict(self) -> dict:
        """What a report says of them: plain numbers, texts and lists."""
        return {
            "models": [{"records": m.records, "auc": m.auc, "ci": list(m.ci)} for m in self.models],
            "settings": asdict(self.settings),
            "base": self.base,
        }


def train_shadows(
    base: Callable[[], Loaded],
    split: Split,
    models: int,
    settings: ShadowSettings,
    folder: Path,
    *,
    public_windows: Windows | None = None,
    progress: Progress = silent,
) -> Shadows:
    """Train `models` shadows on halves of the split's records, score all records by each, forget the weights.

    base: loads the public base afresh, in the type in which the target is stored; called for each shadow that is to be
    trained. public_windows: as given to the target's fine-tune. folder: each shadow's scores appear there by rename,
    under a name made of everything that they depend on; what is there is not made again, so that a killed run goes on
    with the shadow it was at, and the same call gives the same bits on the same machine and number of threads.

    Raises UserError for fewer than two models, or records too few to be halved.
    """
    settings.check(models)
    pool = (*split.members, *split.nonmembers)
    groups = tied(split.members, split.nonmembers)
    inside = halves(models, int(groups.max()) + 1, settings.seed)[:, groups]
    if not inside.any(axis=1).all() or inside.all(axis=1).any():
        raise UserError("too few records to halve for shadow models", got=f"{groups.max() + 1} that differ")
    folder = Path(folder)
    loaded: Loaded | None = base()
    # Everything that a score depends on; whatever changes makes another name, and nothing stale is ever read.
    common = {"format": FORMAT, "base": loaded.sha256, "dtype": str(loaded.dtype), "pool": Split(pool, ()).sha256}
    source, files = loaded.name, []
    for number, mask in enumerate(inside):
        chosen = (*(record for record, taken in zip(pool, mask) if taken), *split.canaries)
        recipe = asdict(settings) | {"seed": _training_seed(settings.seed, number)}
        extra = {"records": Split(chosen, ()).sha256, "public": public_windows and public_windows.sha256}
        path = folder / _name("shadow", common | recipe | extra)
        if not path.exists():
            loaded = loaded or base()
            told = _within(progress, number, models)
            _train(loaded, chosen, replace(settings, seed=recipe["seed"]), public_windows, told)
            _keep(path, loaded, pool, told)
            loaded = None  # before the next one is loaded
            gc.collect()
        files.append({name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()})
        progress("shadows", number + 1, models)
    scores, lengths, n = np.stack([f["mean_log_prob"] for f in files]), files[0]["lengths"], len(split.members)
    sides = (ShadowScores(scores[:, side], inside[:, side], lengths[side]) for side in (slice(n), slice(n, None)))
    found = (_remembered(scores[:, lengths > 0], inside[:, lengths > 0], number) for number in range(models))
    return Shadows(*sides, tuple(found), settings, source)


def tied(members: Sequence[Record], nonmembers: Sequence[Record]) -> Int[np.ndarray, " n"]:
    """The group of every record, members first: near-duplicates of one side, directly or through others, share one."""
    groups: list[np.ndarray] = []
    for side in (members, nonmembers):
        unnumbered = [replace(record, line=None) for record in side]  # pairs by place, not by line of a file
        pairs = near_duplicates(unnumbered, unnumbered)
        one, other = np.array([(p.member - 1, p.nonmember - 1) for p in pairs], np.int64).reshape(-1, 2).T
        graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(len(side), len(side)))
        groups.append(connected_components(graph, directed=False)[1] + sum(int(g.max()) + 1 for g in groups))
    return np.concatenate(groups).astype(np.int64)


def _train(
    loaded: Loaded, records: Sequence[Record], settings: ShadowSettings, public: Windows | None, progress: Progress
) -> None:
    loaded.model.requires_grad_(True)
    finetune(
        loaded.model,
        loaded.tokenizer,
        records,
        epochs=settings.epochs,
        lr=settings.learning_rate,
        batch=settings.batch,
        seed=settings.seed,
        lora=settings.lora,
        public_windows=public,
        progress=progress,
    )


def _keep(path: Path, loaded: Loaded, pool: Sequence[Record], progress: Progress) -> None:
    """Score the pool; write a mean log-probability and a length for each record."""
    scores = score_records(loaded.model, loaded.tokenizer, pool, progress=progress)
    values = {"mean_log_prob": loss.score(Evidence(scores)), "lengths": scores.lengths}
    write_tensors(path, {name: torch.from_numpy(value) for name, value in values.items()})


def _remembered(scores: Float[np.ndarray, "models n"], inside: Bool[np.ndarray, "models n"], number: int) -> Shadow:
    """How one shadow tells its records from the others, each measured against the other shadows."""
    others = np.arange(len(scores)) != number
    out = others[:, None] & ~inside
    # Of two models there is only one other, whether it saw the record or not.
    level = np.where(out.any(axis=0), out, others[:, None])
    gain = scores[number] - np.average(scores, axis=0, weights=level)
    sides = gain[inside[number]], gain[~inside[number]]
    return Shadow(int(inside[number].sum()), auc(*sides), delong_interval(*sides))


def _training_seed(seed: int, number: int) -> int:
    """A seed of its own for each shadow: another order of the records, as the target had another one."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _name(kind: str, facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:32]}.safetensors"


def _within(progress: Progress, number: int, models: int) -> Progress:
    """Progress of one shadow's phases as notes on how many shadows are done."""

    def told(phase: str, done: int, total: int, note: str = "") -> None:
        progress("shadows", number, models, f"{phase} {done}/{total} {note}".rstrip())

    return told

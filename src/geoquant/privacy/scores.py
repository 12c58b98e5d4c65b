"""One forward pass a record gives everything the attacks need.

For every scored token t of a record, with p the model's distribution given the true tokens before it:

    log_prob       log p(x_t)
    mean, std      of log p(z) under z ~ p (Min-K%++, arXiv:2404.02936, standardises log_prob with them)
    correct        x_t is the argmax of p (lowest index where tied)
    digit_mass     log of p's mass on the ten digit tokens, where x_t is one of them; NaN elsewhere
    starts, ends   the characters [start, end) of the record that the token covers

A BOS token is put first if and only if the tokenizer adds one by default; without it the first token of a
record has no prefix and is not scored. Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geoquant.data.private import decoy_records
from geoquant.data.records import Record, Split
from geoquant.data.text import adds_bos
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import check_head, final_hidden, head_logits, head_rows
from geoquant.model.vocabulary import vocabulary_rows
from geoquant.progress import Progress, silent
from geoquant.runs import read_tensors, write_tensors

__all__ = [
    "RecordScores",
    "SplitScores",
    "digit_tokens",
    "load_scores",
    "save_scores",
    "score_records",
    "score_split",
]


@dataclass(frozen=True)
class RecordScores:
    """Per-token statistics of n records, concatenated; record i owns tokens splits[i]:splits[i+1]."""

    log_prob: Float[np.ndarray, " tokens"]
    mean: Float[np.ndarray, " tokens"]
    std: Float[np.ndarray, " tokens"]
    correct: Bool[np.ndarray, " tokens"]
    digit_mass: Float[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]
    splits: Int[np.ndarray, " n+1"]

    def __len__(self) -> int:
        return len(self.splits) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Scored tokens of each record."""
        return np.diff(self.splits)

    def record_sums(self, values: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " n"]:
        """Sum of a per-token quantity over each record; 0 for a record without scored tokens."""
        return np.diff(np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])[self.splits])

    def covering(self, record: int, start: int, end: int) -> slice | None:
        """The tokens of `record` that touch characters [start, end); None if one was not scored."""
        low, high = self.splits[record], self.splits[record + 1]
        touching = np.flatnonzero((self.starts[low:high] < end) & (self.ends[low:high] > start)) + low
        if not len(touching):
            return None
        part = slice(int(touching[0]), int(touching[-1]) + 1)
        complete = self.starts[part.start] <= start and self.ends[part.stop - 1] >= end
        return part if complete else None


@dataclass(frozen=True)
class SplitScores:
    """One model's scores on the two sides of a split and on its canaries.

    decoys: the canaries with other random secrets, `len(decoys) / len(canaries)` for each in order; only made
    where the tokenizer merges digits (see privacy/exposure.py). withheld: canaries that coins left out. lowered_*: the
    texts of the two sides in lower case.
    """

    members: RecordScores
    nonmembers: RecordScores
    canaries: RecordScores | None = None
    decoys: RecordScores | None = None
    withheld: RecordScores | None = None
    lowered_members: RecordScores | None = None
    lowered_nonmembers: RecordScores | None = None


def digit_tokens(tokenizer) -> Int[Tensor, 10] | None:
    """Ids of the tokens 0..9, or None when the tokenizer merges neighbouring digits."""
    ids = tokenizer("x0918273645", add_special_tokens=False).input_ids[-10:]
    pieces = [tokenizer.decode([token]).strip() for token in ids]
    if pieces != list("0918273645"):
        return None
    return torch.tensor([ids[pieces.index(digit)] for digit in "0123456789"])


def _encode(tokenizer, records: Sequence[Record], limit: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids (with BOS where due) and the characters of every token but a BOS, cut to `limit` tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("this tokenizer cannot say which characters a token covers", wanted="a fast tokenizer")
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer(
        [record.text for record in records],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    body = limit - len(bos)
    return [(bos + i[:body], o[:body]) for i, o in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped by length, so that a batch padded to its longest stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def score_records(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    batch_tokens: int = 4096,
    max_tokens: int = 1024,
    bfloat16: bool = False,
    progress: Progress = silent,
) -> RecordScores:
    """Score every record by one forward pass of a causal language model, on the device it lives on.

    batch_tokens bounds a batch (padding included); the vocabulary is projected a few positions at a time.
    bfloat16 multiplies in half precision where that is fast: log-probabilities move by about 0.01.
    Records longer than max_tokens (or the model's context) are cut there; their later spans are not measured.
    """
    if not records:
        raise UserError("no records to score")
    limit = min(max_tokens, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens)
    encoded = _encode(tokenizer, records, limit)
    # Padding goes to the right: a causal model's real positions never see it, so no mask is needed.
    rows = vocabulary_rows(model)
    # A padding token that was added without a row for it is as good as none.
    padding = 0 if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows else tokenizer.pad_token_id
    bos = int(adds_bos(tokenizer))
    counts = [max(len(ids) - 1, 0) for ids, _ in encoded]
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(splits[-1])
    log_prob, mean, std, mass = (np.full(total, np.nan, np.float32) for _ in range(4))
    correct = np.zeros(total, bool)
    offsets = [pair for _, marks in encoded for pair in marks[1 - bos :]]
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    digits = digit_tokens(tokenizer)
    device = model.device
    was_training = model.training
    model.eval()
    done = 0
    try:
        check_head(model, torch.tensor([next((ids for ids, _ in encoded if len(ids) > 1), [padding, padding])]))
        for batch in _batches([len(ids) for ids, _ in encoded], batch_tokens):
            longest = max(len(encoded[index][0]) for index in batch)
            if longest > 1:
                tokens = torch.full((len(batch), longest), padding, dtype=torch.int64)
                for row, index in enumerate(batch):
                    tokens[row, : counts[index] + 1] = torch.tensor(encoded[index][0])
                rows = torch.cat([torch.full((counts[i],), row) for row, i in enumerate(batch)])
                columns = torch.cat([torch.arange(counts[i]) for i in batch])
                where = np.concatenate([np.arange(splits[i], splits[i + 1]) for i in batch])
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                    hidden = final_hidden(model, tokens.to(device))
                chunk = head_rows(model)
                for begin in range(0, len(rows), chunk):
                    part = slice(begin, begin + chunk)
                    truth = tokens[rows[part], columns[part] + 1].to(device)
                    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                        logits = head_logits(model, hidden[rows[part].to(device), columns[part].to(device)])
                    values = _statistics(logits, truth, digits)
                    for target, value in zip((log_prob, mean, std, correct, mass), values, strict=True):
                        target[where[part]] = value.cpu().numpy()
            done += len(batch)
            progress("score", done, len(records), "records")
    finally:
        model.train(was_training)
    return RecordScores(log_prob, mean, std, correct, mass, ranges[:, 0].copy(), ranges[:, 1].copy(), splits)


def _statistics(logits: Float[Tensor, "p v"], truth: Int[Tensor, " p"], digits: Int[Tensor, 10] | None):
    """log_prob, mean, std, correct, digit_mass (each (p,)) of the true tokens under these logits."""
    correct = logits.argmax(dim=1) == truth
    logp = torch.log_softmax(logits, dim=1)
    log_prob = logp.gather(1, truth[:, None])[:, 0]
    if digits is None:
        mass = torch.full_like(log_prob, float("nan"))
    else:
        digits = digits.to(truth.device)
        mass = torch.logsumexp(logp[:, digits], dim=1)
        mass[~torch.isin(truth, digits)] = float("nan")
    p = logp.exp()
    # An impossible token (logit -inf) contributes 0, not 0 * inf.
    logp = logp.nan_to_num(neginf=0.0)
    mean = (p * logp).sum(dim=1)
    std = (p * (logp - mean[:, None]) ** 2).sum(dim=1).sqrt()
    return log_prob, mean, std, correct, mass


def score_split(
    model,
    tokenizer,
    split: Split,
    *,
    batch_tokens: int = 4096,
    bfloat16: bool = False,
    decoys: int = 255,
    seed: int = 0,
    progress: Progress = silent,
) -> SplitScores:
    """Score both sides, as written and in lower case, the canaries, planted and withheld, and, where digits are merged,
    `decoys` other secrets each.
    """

    def score(records: Sequence[Record]) -> RecordScores | None:
        if not records:
            return None
        return score_records(model, tokenizer, records, batch_tokens=batch_tokens, bfloat16=bfloat16, progress=progress)

    merged = split.canaries and digit_tokens(tokenizer) is None
    others = decoy_records(split.canaries, decoys, seed) if merged else ()
    lowered = ([Record(record.text.lower()) for record in side] for side in (split.members, split.nonmembers))
    parts = (split.members, split.nonmembers, split.canaries, others, split.withheld, *lowered)
    return SplitScores(*(score(part) for part in parts))


def save_scores(path: Path, scores: SplitScores, split: Split) -> None:
    """Write one safetensors file; the hash of the records goes with it."""
    tensors = {}
    for side in fields(SplitScores):
        part = getattr(scores, side.name)
        if part is not None:
            for name in fields(RecordScores):
                tensors[f"{side.name}.{name.name}"] = torch.from_numpy(getattr(part, name.name))
    write_tensors(path, tensors, {"records": split.sha256})


def load_scores(path: Path, split: Split) -> SplitScores:
    """Read what `save_scores` wrote. Raises UserError when it belongs to other records."""
    tensors, metadata = read_tensors(path)
    if metadata.get("records") != split.sha256:
        raise UserError(f"{path} holds scores of other records", fix="delete it and run again")
    parts = {}
    for side in fields(SplitScores):
        names = {field.name: f"{side.name}.{field.name}" for field in fields(RecordScores)}
        if names["splits"] in tensors:
            parts[side.name] = RecordScores(**{name: tensors[key].numpy() for name, key in names.items()})
    return SplitScores(**parts)

"""One forward pass a record gives everything the attacks need (see scores.py).

A BOS token is put first if and only if the tokenizer adds one by default; without it the first token of a
record has no prefix and is not scored.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.data.private import decoy_records
from geoquant.data.records import Record, Split
from geoquant.data.text import adds_bos, digit_tokens
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import check_head, final_hidden, head_logits, head_rows
from geoquant.model.modes import evaluating
from geoquant.model.vocabulary import vocabulary_rows
from geoquant.privacy.distribution import statistics
from geoquant.privacy.exposure import walk_ranks
from geoquant.privacy.prompts import make_prompts
from geoquant.privacy.scores import Kept, RecordScores, SplitScores
from geoquant.progress import Progress, silent

__all__ = ["check_same_tokens", "encode", "score_records", "score_split"]

MAX_TOKENS = 1024
FORM = "1"  # of what is kept: files of another form are not read


def encode(tokenizer, records: Sequence[Record], limit: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
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


def check_same_tokens(model: str, tokenizer, reference: str, other, split: Split) -> None:
    """Before either model is asked: raises UserError where their tokenizers cut the records in different places.

    model, reference: their names. Attacks that subtract one model's log-probabilities from the other's need this.
    """
    for record in (*split.members, *split.nonmembers, *split.canaries, *split.withheld):
        (_, own), (_, its) = (encode(one, [record], sys.maxsize)[0] for one in (tokenizer, other))
        if own != its or adds_bos(tokenizer) != adds_bos(other):
            raise UserError(
                f"the reference {reference} cuts the records into other tokens than {model}",
                wanted="a reference with the same tokenizer",
                fix="give the base model of the fine-tune as --reference",
            )


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


def score_records(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    batch_tokens: int = 4096,
    max_tokens: int = MAX_TOKENS,
    bfloat16: bool = False,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> RecordScores:
    """Score every record by one forward pass of a causal language model, on the device it lives on.

    batch_tokens bounds a batch (padding included); the vocabulary is projected a few positions at a time.
    bfloat16 multiplies in half precision where that is fast: log-probabilities move by about 0.01.
    Records longer than max_tokens (or the model's context) are cut there; their later spans are not measured.
    kept: where scores of the same texts under the same weights are looked up, and put.

    Raises UserError: no records, a tokenizer that is none of this model's, logits that are no head of a hidden state,
    NaN.
    """
    if not records:
        raise UserError("no records to score")
    limit = min(max_tokens, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens)
    encoded = encode(tokenizer, records, limit)
    rows = vocabulary_rows(model)
    if (largest := max((max(ids, default=0) for ids, _ in encoded), default=0)) >= rows:
        raise UserError(
            "the tokenizer is not this model's",
            got=f"token {largest} where the model has {rows}",
            fix="give the tokenizer that the model was trained with",
        )
    name = _content_name(encoded, digit_tokens(tokenizer), bfloat16) if kept else ""
    if kept and (found := kept.read(name)) is not None:
        progress("score", len(records), len(records), "texts, kept from before")
        return found
    # A padding token that was added without a row for it is as good as none.
    padding = 0 if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows else tokenizer.pad_token_id
    scores = _scored(model, tokenizer, encoded, padding, batch_tokens, bfloat16, progress)
    if np.isnan(scores.log_prob).any():
        raise UserError(
            "the model gives some records no probability (NaN)",
            fix="its weights or codes are damaged, or overflow in its number type: look at its perplexity first",
        )
    if kept:
        kept.write(name, scores)
    return scores


def _content_name(encoded: list, digits: Int[Tensor, 10] | None, bfloat16: bool) -> str:
    """Names the texts as the model sees them, and how they are scored."""
    seen = [FORM, bfloat16, None if digits is None else digits.tolist(), encoded]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:32]


@torch.no_grad()
def _scored(
    model, tokenizer, encoded: list, padding: int, batch_tokens: int, bfloat16: bool, progress: Progress
) -> RecordScores:
    """The scores of encoded records. Padding goes to the right: real positions never see it, so no mask is needed."""
    bos = int(adds_bos(tokenizer))
    counts = [max(len(ids) - 1, 0) for ids, _ in encoded]
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(splits[-1])
    log_prob, mean, std, mass = (np.full(total, np.nan, np.float32) for _ in range(4))
    rank = np.zeros(total, np.int32)
    offsets = [pair for _, marks in encoded for pair in marks[1 - bos :]]
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    digits = digit_tokens(tokenizer)
    device = model.device
    done = 0
    with evaluating(model):
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
                    values = statistics(logits, truth, digits)
                    for target, value in zip((log_prob, mean, std, rank, mass), values, strict=True):
                        target[where[part]] = value.cpu().numpy()
            done += len(batch)
            progress("score", done, len(encoded), "texts")
    return RecordScores(log_prob, mean, std, rank, mass, ranges[:, 0].copy(), ranges[:, 1].copy(), splits)


def score_split(
    model,
    tokenizer,
    split: Split,
    *,
    batch_tokens: int = 4096,
    bfloat16: bool = False,
    decoys: int = 255,
    seed: int = 0,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> SplitScores:
    """Score both sides, as written, in lower case and as an attacker would ask for them, the canaries, planted and
    withheld, and, where digits are merged, `decoys` other secrets each.
    """

    digits = digit_tokens(tokenizer)
    merged = split.canaries and digits is None
    others = decoy_records(split.canaries, decoys, seed) if merged else ()
    lowered = ([Record(record.text.lower()) for record in side] for side in (split.members, split.nonmembers))
    asked = ([prompt.record for prompt in make_prompts(side)] for side in (split.members, split.nonmembers))
    parts = (split.members, split.nonmembers, split.canaries, others, split.withheld, *lowered, *asked)
    total, before = sum(map(len, parts)), 0

    def score(records: Sequence[Record]) -> RecordScores | None:
        nonlocal before
        if not records:
            return None
        scores = score_records(
            model,
            tokenizer,
            records,
            batch_tokens=batch_tokens,
            bfloat16=bfloat16,
            kept=kept,
            progress=lambda phase, done, _, note="": progress(phase, before + done, total, note),
        )
        before += len(records)
        return scores

    found = SplitScores(*(score(part) for part in parts))
    if not split.canaries or merged:
        return found
    secrets = [(record.canary.start, record.canary.end) for record in split.canaries]
    encoded = encode(tokenizer, split.canaries, MAX_TOKENS)
    name = f"ranks-{_content_name([encoded, secrets], digits, bfloat16)}"
    walked = kept.read(name) if kept else None
    if walked is None:
        walked = walk_ranks(model, tokenizer, split.canaries, found.canaries)
        if kept:
            kept.write(name, walked)
    return replace(found, walked=walked)

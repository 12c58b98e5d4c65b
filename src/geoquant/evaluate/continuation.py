"""Word-prediction tasks (LAMBADA): does the model's most likely text go on as the true one does?

One item a line of a `.jsonl` file:

    {"context": "... she forced the words through her", "continuation": "teeth"}

The model reads `context` without its trailing white space; a blank and the continuation follow. An item counts as
correct if each token of the continuation is the most likely one after the true tokens before it, which is the
accuracy of LAMBADA (Paperno et al. 2016) under greedy decoding. Scores are nats per byte of the continuation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from geoquant.data.jsonl import check_encodable
from geoquant.data.text import adds_bos
from geoquant.errors import UserError
from geoquant.evaluate.choices import ChoiceResult, Row, Task, batches, common, standard_error
from geoquant.evaluate.perplexity import check_head, final_hidden, head_logits
from geoquant.progress import Progress, silent

__all__ = ["SHAPE", "Continuation", "continuations", "parse"]

SHAPE = '{"context": "...", "continuation": "..."} on every line'


@dataclass(frozen=True)
class Continuation:
    """A text and how it goes on."""

    context: str
    continuation: str


def parse(where: str, item: object) -> Continuation:
    """One checked item; `where` is file:line. Raises UserError."""
    if not isinstance(item, dict):
        raise UserError(f"{where} is not a JSON object", wanted=SHAPE)
    for name in ("context", "continuation"):
        if not isinstance(item.get(name), str) or not item[name].strip():
            raise UserError(f"{where} has no text in {name!r}", got=repr(item.get(name))[:60], wanted=SHAPE)
    check_encodable(where, item["context"] + item["continuation"])
    return Continuation(item["context"].rstrip(), item["continuation"].strip())


def rows(tokenizer, items: tuple[Continuation, ...], longest: int) -> list[Row]:
    """Tokens of every item, cut on the left; scored from the first one on in which it differs from its context."""
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    texts = [item.context for item in items] + [f"{item.context} {item.continuation}" for item in items]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    found = []
    for index, (context, whole) in enumerate(zip(encoded, encoded[len(items) :])):
        tokens = bos + whole[-(longest - len(bos)) :]
        found.append(Row(index, 0, tuple(tokens), max(1, len(tokens) - (len(whole) - common(context, whole)))))
    return found


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer, task: Task, *, batch_tokens: int = 2048, progress: Progress = silent
) -> ChoiceResult:
    """Accuracy on a task of `Continuation` items; arguments as in `choices`."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = rows(tokenizer, task.items, limit or 1 << 30)
    check_head(model, torch.tensor([wanted[0].tokens]))
    device = next(model.parameters()).device
    correct, scores, done = [False] * len(task), [(0.0,)] * len(task), 0
    for batch in batches(wanted, batch_tokens):
        tokens = torch.zeros(len(batch), max(len(row.tokens) for row in batch), dtype=torch.int64)
        for place, row in enumerate(batch):
            tokens[place, : len(row.tokens)] = torch.tensor(row.tokens)
        hidden = final_hidden(model, tokens.to(device))
        for place, row in enumerate(batch):
            # Position t-1 predicts token t.
            logits = head_logits(model, hidden[place, row.scored - 1 : len(row.tokens) - 1])
            truth = torch.tensor(row.tokens[row.scored :], device=device)
            total = torch.log_softmax(logits, -1).gather(1, truth[:, None]).sum().item()
            scores[row.item] = (total / len(task.items[row.item].continuation.encode()),)
            # Logits that are no numbers answer nothing, whatever argmax makes of them.
            correct[row.item] = math.isfinite(total) and bool((logits.argmax(-1) == truth).all())
        done += len(batch)
        progress(task.name, done, len(wanted))
    right = np.array(correct, dtype=float)
    return ChoiceResult(task.name, right.mean().item(), standard_error(right), len(task), tuple(correct), tuple(scores))

"""Multiple-choice tasks: which of the given answers does the model find most likely, per byte?

One item a line of a `.jsonl` file (PIQA and ARC in this form are a few hundred kilobytes each):

    {"query": "Question: Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "gold": 1}

The model reads `query` without its trailing white space, then "\\nAnswer:", then a blank and the choice. Blank
and choice are scored:

    score(choice) = sum_t log p(token_t | all tokens before it) / bytes(choice)

with `bytes` the UTF-8 length of the choice without the blank: a measure of length that no tokenizer changes
(for ASCII it is the `acc_norm` of the language model evaluation harness). An item counts as correct if the gold
choice scores strictly higher than every other one, so ties and NaN count as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from geoquant.data.jsonl import check_encodable
from geoquant.data.text import adds_bos
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import check_head, final_hidden, head_nll
from geoquant.progress import Progress, silent

__all__ = [
    "SHAPE",
    "ChoiceResult",
    "Item",
    "Row",
    "Task",
    "batches",
    "choices",
    "common",
    "difference",
    "parse",
    "standard_error",
]

CUE = "\nAnswer:"
SHAPE = '{"query": "...", "choices": ["...", "..."], "gold": 0} on every line'


@dataclass(frozen=True)
class Item:
    """A question, its possible answers, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int

    @property
    def prompt(self) -> str:
        """What the model reads before a choice, without the blank between the two."""
        return self.query.rstrip() + CUE


@dataclass(frozen=True)
class Task:
    """Items of one file; `sha256` is that of the whole file."""

    name: str
    items: tuple  # of Item, or of Continuation
    sha256: str

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy in [0, 1] and its standard error over items; per item whether it was right, and its scores.

    scores: nats per byte of every choice, in the order of the file.
    """

    name: str
    accuracy: float
    se: float
    items: int
    correct: tuple[bool, ...]
    scores: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict:
        """For `report.json`: without the scores."""
        return {"name": self.name, "accuracy": self.accuracy, "se": self.se, "items": self.items}


@dataclass(frozen=True)
class Row:
    """Tokens of one (item, choice) pair; those from `scored` on are the choice's."""

    item: int
    choice: int
    tokens: tuple[int, ...]
    scored: int


def parse(where: str, item: object) -> Item:
    """One checked item; `where` is file:line. Raises UserError."""
    if not isinstance(item, dict):
        raise UserError(f"{where} is not a JSON object", wanted=SHAPE)
    for name in ("query", "choices", "gold"):
        if name not in item:
            raise UserError(f"{where} has no field {name!r}", wanted=SHAPE)
    query, options, gold = item["query"], item["choices"], item["gold"]
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{where} has no text in 'query'", got=repr(query)[:60], wanted=SHAPE)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(c, str) and c.strip() for c in options):
        raise UserError(f"{where} has malformed 'choices'", wanted="a list of at least 2 texts that are not empty")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise UserError(
            f"{where} has a wrong 'gold'", got=repr(gold)[:60], wanted=f"a whole number from 0 to {len(options) - 1}"
        )
    check_encodable(where, "".join([query, *options]))
    return Item(query, tuple(c.strip() for c in options), gold)


def _rows(tokenizer, items: tuple[Item, ...], longest: int) -> list[Row]:
    """Tokens of every (item, choice), cut on the left to the `longest` input the model can read.

    Prompt and choice are tokenised together. Tokens count as the choice's from the first one in which the
    item's rows, or the prompt alone, differ: where a tokenizer merges across the seam, all choices of an item
    are still scored from the same place.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    texts = [item.prompt for item in items] + [f"{i.prompt} {c}" for i in items for c in i.choices]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    prompts = [next(encoded) for _ in items]
    rows = []
    for index, (item, prompt) in enumerate(zip(items, prompts)):
        pieces = [next(encoded) for _ in item.choices]
        shared = min(common(prompt, piece) for piece in pieces)
        for choice, piece in enumerate(pieces):
            tokens = bos + piece[-(longest - len(bos)) :]
            # Nothing predicts the first token of a row, so it is never scored.
            scored = max(1, len(tokens) - (len(piece) - shared))
            rows.append(Row(index, choice, tuple(tokens), scored))
    return rows


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, the longest first, so that memory runs out at once if it does."""
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    while rows:
        size = max(1, batch_tokens // len(rows[0].tokens))
        yield rows[:size]
        rows = rows[size:]


def _log_likelihoods(model: nn.Module, batch: list[Row]) -> list[float]:
    """Summed log-probability of each row's scored tokens.

    Rows are padded on the right, where a causal model's earlier positions cannot see; so no mask is needed, and
    without one attention takes its fast path.
    """
    device = next(model.parameters()).device
    longest = max(len(row.tokens) for row in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    wanted = torch.zeros(len(batch), longest, dtype=torch.bool)
    for index, row in enumerate(batch):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        wanted[index, row.scored : len(row.tokens)] = True
    tokens, wanted = tokens.to(device), wanted.to(device)
    hidden = final_hidden(model, tokens)
    # Position t-1 predicts token t; only those of the choices meet the vocabulary.
    nll = head_nll(model, hidden[:, :-1][wanted[:, 1:]], tokens[wanted]).double()
    owner = torch.nonzero(wanted)[:, 0]
    sums = torch.zeros(len(batch), dtype=torch.float64, device=device).index_add_(0, owner, nll)
    return (-sums).tolist()


@torch.no_grad()
def choices(
    model: nn.Module, tokenizer, task: Task, *, batch_tokens: int = 2048, progress: Progress = silent
) -> ChoiceResult:
    """Answer every item of `task`; `batch_tokens` bounds the padded tokens of one forward pass.

    Rows longer than the model's `max_position_embeddings` lose the start of their query.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = _rows(tokenizer, task.items, limit or 1 << 30)
    check_head(model, torch.tensor([rows[0].tokens]))
    scores = [[math.nan] * len(item.choices) for item in task.items]
    done = 0
    for batch in batches(rows, batch_tokens):
        for row, total in zip(batch, _log_likelihoods(model, batch)):
            text = task.items[row.item].choices[row.choice]
            scores[row.item][row.choice] = total / len(text.encode())
        done += len(batch)
        progress(task.name, done, len(rows))
    correct = tuple(_wins(item.gold, values) for item, values in zip(task.items, scores))
    right = np.array(correct, dtype=float)
    return ChoiceResult(
        task.name, right.mean().item(), standard_error(right), len(task), correct, tuple(map(tuple, scores))
    )


def _wins(gold: int, values: list[float]) -> bool:
    return all(values[gold] > value for index, value in enumerate(values) if index != gold)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; 0 for a single one."""
    return values.std(ddof=1).item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def difference(before: ChoiceResult, after: ChoiceResult) -> dict[str, float | int]:
    """Change of the accuracy on the same items: value, paired standard error, items won and lost, and p.

    `p` is McNemar's exact two-sided one: of the items on which the two disagree, are wins and losses a fair coin?

    Raises ValueError when the results are not of the same items.
    """
    from scipy.stats import binomtest

    if (before.name, before.items) != (after.name, after.items):
        raise ValueError(f"{before.items} items of {before.name} cannot pair with {after.items} of {after.name}")
    change = np.array(after.correct, dtype=float) - np.array(before.correct, dtype=float)
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    p = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    return {"value": change.mean().item(), "se": standard_error(change), "won": won, "lost": lost, "p": float(p)}

"""Task files of any kind: the fields of their first line say which."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from torch import nn

from geoquant.data.jsonl import json_lines, read_utf8
from geoquant.errors import UserError
from geoquant.evaluate import choices, continuation
from geoquant.evaluate.choices import ChoiceResult, Task
from geoquant.progress import Progress, silent
from geoquant.runs import file_hash

__all__ = ["answer", "load_task"]


def load_task(path: str | Path, limit: int | None = None) -> Task:
    """The first `limit` items (all, when None) of a `.jsonl` file, each checked.

    Raises UserError naming file:line of the first broken line.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"cannot take {limit} items of {path}", wanted="at least 1")
    text = read_utf8(path, "task", "a .jsonl file of multiple-choice items")
    kind = continuation if '"continuation"' in text.partition("\n")[0] else choices
    # `islice` leaves the lines behind the last item wanted unread, so they may be broken.
    items = tuple(kind.parse(where, item) for where, item in islice(json_lines(path, text, kind.SHAPE), limit))
    if not items:
        raise UserError(f"{path} holds no items", wanted=kind.SHAPE)
    return Task(path.stem, items, file_hash(path))


def answer(model: nn.Module, tokenizer, task: Task, *, progress: Progress = silent) -> ChoiceResult:
    """Let the model answer every item."""
    kind = continuation.continuations if isinstance(task.items[0], continuation.Continuation) else choices.choices
    return kind(model, tokenizer, task, progress=progress)

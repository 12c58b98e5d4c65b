"""Measure the quality of one model, ours or not."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from geoquant.data.text import Windows, read_text
from geoquant.data.text import windows as cut_windows
from geoquant.errors import UserError
from geoquant.evaluate.divergence import final_states, measure
from geoquant.evaluate.perplexity import perplexity
from geoquant.evaluate.tasks import answer, load_task
from geoquant.measure import builtin_tail
from geoquant.model.load import Loaded, load
from geoquant.model.vocabulary import head_weight
from geoquant.progress import Progress, silent

__all__ = ["check_context", "evaluate"]


def evaluate(
    model: str,
    text: str | None = None,
    count: int = 20,
    length: int = 512,
    tasks: Sequence[str | Path] = (),
    reference: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    *,
    items: int | None = None,
) -> dict:
    """Perplexity of any model folder by the windows protocol, divergence from `reference`, multiple-choice accuracy.

    The reference is read first and dropped: only its final states and its head stay in memory.
    """

    def cut(tokenizer) -> Windows:
        if text is None:
            return builtin_tail(tokenizer, length, count)
        return cut_windows(tokenizer, read_text(text), length=length, count=count, source=text)

    read_tasks = [load_task(path, items) for path in tasks]
    states = head = known = None
    if reference is not None:
        other = load(reference, device=device)
        check_context(other, length)
        known = cut(other.tokenizer)
        states = final_states(other.model, known, progress=progress)
        head = head_weight(other.model).clone()
        del other
        gc.collect()
    loaded = load(model, device=device, quantized=True)
    check_context(loaded, length)
    measured = cut(loaded.tokenizer)
    if known is not None:
        check_comparable(loaded, measured, known, len(head))
    if states is None:
        result, found = perplexity(loaded.model, measured, progress=progress), None
    else:
        result, found = measure(loaded.model, measured, states, head, progress=progress)
    answers = [(task, answer(loaded.model, loaded.tokenizer, task, progress=progress)) for task in read_tasks]
    return {
        **{key: value for key, value in result.to_dict().items() if key != "windows"},
        "text": measured.source,
        "kl": None if found is None else {"value": found.kl, "se": found.se, "top1": found.top1},
        "tasks": [
            {"name": task.name, "accuracy": got.accuracy, "se": got.se, "items": got.items} for task, got in answers
        ],
    }


def check_comparable(loaded: Loaded, text: Windows, known: Windows, rows: int) -> None:
    """Raise UserError when the model's distributions are not over the reference's tokens.

    known: the reference's windows of the same text; rows: of its vocabulary projection.
    """
    held = loaded.model.config.get_text_config().vocab_size
    if held != rows:
        raise UserError(
            f"the divergence compares models of one vocabulary; {loaded.name} has {held} tokens",
            wanted=f"{rows} as in --reference",
            fix="give the model that it was made from, or leave --reference out",
        )
    if not torch.equal(text.tokens, known.tokens):
        raise UserError(
            f"the tokenizers of {loaded.name} and of --reference cut {text.source} into different tokens",
            fix="give the model that it was made from, or leave --reference out",
        )


def check_context(loaded: Loaded, window: int) -> None:
    """Raise UserError when a window is longer than what the model can read."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or window
    if window > limit:
        raise UserError(
            f"--window {window} is longer than the model's context of {limit} tokens", fix=f"use --window {limit}"
        )

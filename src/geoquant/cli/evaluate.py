"""`geoquant eval`: quality of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, AnyModel, Device, Json
from geoquant.cli.screen import library, output, progress_display

__all__ = ["evaluate"]


def evaluate(
    model: AnyModel,
    /,
    *,
    text: Annotated[
        str | None, Parameter(help="Text, .txt or .jsonl (default: the end of the text every Python carries).")
    ] = None,
    windows: Annotated[int, Parameter(help="Windows measured, the first ones of --text."), WHOLE] = 20,
    window: Annotated[int, Parameter(help="Tokens per window."), WHOLE] = 512,
    tasks: Annotated[
        list[Path] | None,
        Parameter(name="--task", help="Multiple-choice items, .jsonl with query, choices, gold; repeatable."),
    ] = None,
    items: Annotated[
        int | None, Parameter(help="Items taken of each task, from its start (default: all)."), WHOLE
    ] = None,
    reference: Annotated[
        str | None, Parameter(help="Model to measure the divergence from (KL per token), e.g. the original.")
    ] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Perplexity with its standard error, divergence from another model, multiple-choice accuracy.

    For example:

      geoquant eval MODEL --text test.txt --windows 40
      geoquant eval RUN --text test.txt --reference MODEL
      geoquant eval MODEL --task piqa.jsonl --task arc.jsonl --items 500

    To see what a run cost in accuracy, give the same tasks to MODEL and to RUN. A line of a task file:

      {"query": "Two and two make?", "choices": ["three", "four"], "gold": 1}
    """
    with output(json) as result:
        with progress_display() as progress:
            examine = library("examine", progress)
            measured = examine.evaluate(
                model, text, windows, window, tasks or [], reference, device, progress, items=items
            )
        result(measured, lambda: show(measured))


def show(measured: dict) -> None:
    """Perplexity first, then whatever else was measured."""
    print(f"perplexity  {measured['perplexity']:.3f}")
    spread = f"{measured['nll']:.4f} ± {measured['se']:.4f}"
    print(f"nll         {spread} nats per token, {measured['tokens']} tokens")
    print(f"text        {measured['text']}")
    kl = measured.get("kl")
    if kl is not None:
        value = kl["value"] if isinstance(kl, dict) else kl
        error = f" ± {kl['se']:.5f}" if isinstance(kl, dict) and kl.get("se") is not None else ""
        print(f"divergence  {value:.5f}{error} nats per token from the reference")
        if isinstance(kl, dict) and kl.get("top1") is not None:
            print(f"same guess  {100 * kl['top1']:.1f}% of tokens")
    for task in measured.get("tasks") or []:
        error = f" ± {100 * task['se']:.1f}" if task.get("se") is not None else ""
        print(f"{task['name']:<11} {100 * task['accuracy']:.1f}%{error} of {task['items']} items")

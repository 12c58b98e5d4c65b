"""What a command shows: progress on stderr (bars, or lines), its result on stdout (text, or one JSON)."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console

    from geoquant.progress import Progress

__all__ = ["Result", "duration", "library", "output", "plain_value", "progress_display", "stdout_console"]

LINE_SECONDS = 10.0  # plain mode: at most one line of the same phase in this time


@contextmanager
def progress_display(stream=None) -> Iterator[Progress]:
    """A `Progress` to hand to the library: bars on a terminal, lines elsewhere (logs, pipes, CI)."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        with bars(stream) as progress:
            yield progress
    else:
        yield Lines(stream)


@contextmanager
def bars(stream) -> Iterator[Progress]:
    """One bar per phase with the time it has left."""
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.SpinnerColumn(finished_text="[green]✓"),
        rich.TextColumn("{task.description:<22}"),
        rich.BarColumn(bar_width=28),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("[dim]{task.fields[note]}", markup=True),
    )
    with rich.Progress(*columns, console=Console(file=stream), refresh_per_second=5) as display:
        tasks: dict[str, int] = {}

        def progress(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = display.add_task(phase, total=total or None, note="")
            finished = total > 0 and done >= total
            display.update(tasks[phase], completed=done, total=total or None, note="" if finished else escaped(note))

        yield progress


def library(name: str, progress: Progress) -> ModuleType:
    """Import a module of this package that needs torch and transformers, which takes seconds, in plain sight."""
    progress("start", 0, 1, "loading torch and transformers")
    module = import_module(f"geoquant.{name}")
    progress("start", 1, 1)
    return module


def escaped(note: str) -> str:
    """A note as rich shows it literally, short enough for one line."""
    from rich.markup import escape

    return escape(note if len(note) <= 48 else note[:47] + "…")


class Lines:
    """Progress as plain lines: the start and the end of each phase, and now and then in between."""

    def __init__(self, stream, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock = stream, clock
        self.start = clock()
        self.previous = self.start  # when anything was last reported
        self.phases: dict[str, tuple[float, float, int]] = {}  # phase -> (it began, first report, steps done then)
        self.last: dict[str, float] = {}
        self.ended: set[str] = set()

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = self.clock()
        first = phase not in self.phases
        # A phase that first speaks when some of it is done began, as far as anyone can tell, when the last one ended.
        began, heard, base = self.phases.setdefault(phase, (self.previous if done else now, now, done))
        self.previous = now
        finished = total > 0 and done >= total
        if (finished and phase in self.ended) or not (first or finished or now - self.last[phase] >= LINE_SECONDS):
            return
        self.last[phase] = now
        parts = [f"[{duration(now - self.start):>7}] {phase}"]
        if total > 0:
            parts.append(f"{done}/{total}")
        if finished:
            self.ended.add(phase)
            parts.append(f"done in {duration(now - began)}")
        elif total > 0 and done > base:
            parts.append(f"about {duration((now - heard) / (done - base) * (total - done))} left")
        if note and not finished:
            parts.append(note)
        print("  ".join(parts), file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """3.2 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Result:
    """Where a command leaves its result: shown as text, or printed as the one JSON object."""

    def __init__(self) -> None:
        self.value: object = None
        self.show: Callable[[], None] | None = None

    def __call__(self, value: dict, show: Callable[[], None]) -> None:
        self.value, self.show = value, show


@contextmanager
def output(as_json: bool) -> Iterator[Result]:
    """Collect a command's result and print it when the command ends well.

    With `--json` file descriptor 1 points at stderr meanwhile, so that no library can spoil the one object.
    """
    result = Result()
    if not as_json:
        yield result
        if result.show is not None:
            result.show()
        return
    with stdout_to_stderr():
        yield result
    print(json.dumps(plain_value(result.value), ensure_ascii=False, allow_nan=False))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Everything written to stdout inside goes to stderr, from Python and from C."""
    sys.stdout.flush()
    python_stdout = sys.stdout
    saved = None
    with suppress(OSError, ValueError, AttributeError):  # a captured stdout has no descriptor
        if sys.stdout.fileno() == 1:
            saved = os.dup(1)
            os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = python_stdout
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def plain_value(value: object) -> object:
    """The same value made of JSON's own types; NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def stdout_console() -> Console:
    """Rich on stdout; as wide as it takes when nobody looks, so that pipes get whole lines."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)

"""Progress as a plain callable, so that the library draws nothing and the command line can."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Progress", "silent"]


@runtime_checkable
class Progress(Protocol):
    """Called with the phase (stable short name), steps done, steps in all, and a short note."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None: ...


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Draw nothing."""

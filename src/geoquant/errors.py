"""The one error a user can fix: what happened, what was found, what is wanted, what to do next.

The command line prints it as one line and leaves with exit code 2; everything else is a bug (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "missing_package", "unknown_name"]


class UserError(Exception):
    """A mistake or a missing thing that the user can mend; `str()` of it is the single line to print."""

    def __init__(self, what: str, *, got: object = None, wanted: object = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if wanted is not None:
            parts.append(f"wanted {wanted}")
        if fix is not None:
            parts.append(fix)
        # One line always: messages of other libraries that end up in `what` may hold newlines.
        super().__init__(" ".join("; ".join(parts).split()))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An unknown method, metric, format...: lists the known ones and guesses which was meant."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}", wanted=f"one of {', '.join(known)}" if close else None, fix=hint)


def missing_package(package: str, extra: str, purpose: str) -> UserError:
    """An optional dependency is absent at the moment it is needed."""
    return UserError(f"{purpose} needs the package {package!r}", fix=f"run: pip install 'geoquant[{extra}]'")

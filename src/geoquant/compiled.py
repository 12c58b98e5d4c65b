"""How this package compiles functions with numba."""

from __future__ import annotations

from collections.abc import Callable

import numba

__all__ = ["compiled"]


def compiled(**options: object) -> Callable[[Callable], Callable]:
    """Compile a function free of Python's lock, and keep the machine code on the disk where there is a place for it.

    numba raises at the decoration where it finds none (a read-only installation and no home folder): there functions
    are compiled anew in every process. The constants of a function must be in its file: numba's cache knows that alone.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)

    return decorate

"""Tells transformers of the format `geoquant` when, and only when, somebody imports transformers.

`import geoquant` must cost nothing, and transformers takes seconds to import: so its module of quantizers is watched
for, and the reader is registered right after that module has run.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["install"]

WATCHED, READER = "transformers.quantizers.auto", "geoquant.export.reader"


class _Watcher:
    """A finder that finds the watched module where it is and adds a step after it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(_Watcher)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Import the reader, which registers itself; without the coder's library other models must still load."""
    with suppress(ImportError):
        import_module(READER)


def install() -> None:
    """Register the reader now if transformers is there already, else as soon as it is."""
    if WATCHED in sys.modules:
        register()
    elif _Watcher not in sys.meta_path:
        sys.meta_path.insert(0, _Watcher)

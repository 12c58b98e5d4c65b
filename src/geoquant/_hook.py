"""Tells transformers of the format `geoquant` when, and only when, somebody imports transformers.

`import geoquant` must cost nothing, and transformers takes seconds to import: so its module of quantizers is watched
for, and the reader is registered right after that module has run.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["install", "withdraw"]

WATCHED, READER, METHOD = "transformers.quantizers.auto", "geoquant.export.reader", "geoquant"


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


class _Absent:
    """Stands for the reader that could not be imported; whoever loads a file of ours is told why."""

    @classmethod
    def from_dict(cls, settings: dict, **options: object) -> object:
        """What transformers calls first. The import is tried again: it may have failed for a circle of imports."""
        from geoquant.errors import UserError

        try:
            import_module(READER)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the reader of the format geoquant cannot be imported ({said})", fix="run: geoquant doctor"
            ) from error
        return mappings()[0][METHOD].from_dict(settings, **options)


def register() -> None:
    """Import the reader, which registers itself; whatever is the matter with that, other models must still load."""
    try:
        import_module(READER)
    except Exception:
        for mapping in mappings():
            mapping[METHOD] = _Absent


def withdraw() -> None:
    """Take back what stands for the reader, or what one that failed half-way left."""
    for mapping in mappings():
        mapping.pop(METHOD, None)


def mappings() -> tuple[dict, dict]:
    """Where transformers looks up a format."""
    auto = sys.modules[WATCHED]
    return auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING


def install() -> None:
    """Register the reader now if transformers is there already, else as soon as it is."""
    if WATCHED in sys.modules:
        register()
    elif _Watcher not in sys.meta_path:
        sys.meta_path.insert(0, _Watcher)

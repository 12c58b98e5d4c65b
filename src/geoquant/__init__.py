"""GeoQuant: compress a language model, and measure how much private training data its weights still reveal.

    import geoquant

    report = geoquant.quantize(geoquant.Recipe(model="MODEL", bits=4), out="RUN")
    loaded = geoquant.load("RUN", quantized=True)  # .model, .tokenizer; kept columns merged in
    found = geoquant.audit(loaded.model, members, nonmembers, tokenizer=loaded.tokenizer)

Names are imported on first use, so that `import geoquant` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from geoquant import _hook

if TYPE_CHECKING:
    from geoquant.analysis import analyze
    from geoquant.auditing import audit
    from geoquant.benching import bench
    from geoquant.charting import frontier
    from geoquant.errors import UserError
    from geoquant.identifying import identify
    from geoquant.model.load import load
    from geoquant.pipeline import make_plan, quantize
    from geoquant.recipe import Recipe

__all__ = [
    "Recipe",
    "UserError",
    "__version__",
    "analyze",
    "audit",
    "bench",
    "frontier",
    "identify",
    "load",
    "make_plan",
    "quantize",
]

__version__ = "0.1.0"

# public name -> (module, name there)
PUBLIC = {
    "Recipe": ("geoquant.recipe", "Recipe"),
    "analyze": ("geoquant.analysis", "analyze"),
    "audit": ("geoquant.auditing", "audit"),
    "bench": ("geoquant.benching", "bench"),
    "frontier": ("geoquant.charting", "frontier"),
    "identify": ("geoquant.identifying", "identify"),
    "UserError": ("geoquant.errors", "UserError"),
    "load": ("geoquant.model.load", "load"),
    "make_plan": ("geoquant.pipeline", "make_plan"),
    "quantize": ("geoquant.pipeline", "quantize"),
}


# So that AutoModelForCausalLM.from_pretrained reads our coded checkpoints.
_hook.install()


def __getattr__(name: str) -> object:
    """Import a public name the first time it is asked for."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'geoquant' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted(__all__)

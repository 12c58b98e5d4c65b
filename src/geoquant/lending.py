"""Models that levers made, lent from run to run: points of a frontier that differ in what follows need one model.

    SHARED/protected-KEY/   as RUN/protected; its files are links to those of the run that made it, and take no space

The key names all that such a model follows from: both models' tensors, the texts, and the options of its levers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from geoquant.manifest import versions
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded
from geoquant.recipe import Recipe
from geoquant.runs import atomic_directory, file_hash

__all__ = ["lendable", "link_folder"]

FILES = ("private", "domain")
OPTIONS = ("anchor", "aim", "forget", "forget_weight", "seed", "window", "device")


def lendable(
    shared: Path | None, recipe: Recipe, loaded: Loaded, base: Loaded, public: Int[Tensor, "n length"]
) -> Path | None:
    """Where runs in the same place have this model, or leave it; None where it is sooner made than looked for. To be
    asked before a lever moves the given model.
    """
    if shared is None or not recipe.forget:
        return None
    told = {name: file_hash(Path(getattr(recipe, name))) for name in FILES}
    told |= {name: getattr(recipe, name) for name in OPTIONS}
    told |= {"model": model_hash(loaded.model), "base": model_hash(base.model), "versions": versions()}
    told["public"] = hashlib.sha256(public.cpu().numpy().tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
    return shared / f"protected-{key}"


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a folder of the same files. Whoever changes one of them writes a new one in its place, as all
    writers here do; where links cannot be made, they are copied.
    """
    with atomic_directory(target) as partial:
        for entry in source.iterdir():
            try:
                os.link(entry, partial / entry.name)
            except OSError:
                shutil.copy2(entry, partial / entry.name)

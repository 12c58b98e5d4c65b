"""Learned rounding: which of the nearest lattice points keeps the function and not the records."""

from geoquant.privacy.refine.losses import Losses
from geoquant.privacy.refine.material import Material, context_of, observe_base, observe_original, texts_of
from geoquant.privacy.refine.run import Refined, RefineSettings, refine
from geoquant.privacy.refine.state import State

__all__ = [
    "Losses",
    "Material",
    "RefineSettings",
    "Refined",
    "State",
    "context_of",
    "observe_base",
    "observe_original",
    "refine",
    "texts_of",
]

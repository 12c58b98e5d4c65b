"""Learned rounding: which of the nearest lattice points keeps the function and not the records."""

from geoquant.privacy.refine.blockwise import BlockError, refine_blocks
from geoquant.privacy.refine.geometry import Bounds, Cloud, Geometry, begin_geometry, observe_clouds
from geoquant.privacy.refine.losses import Losses
from geoquant.privacy.refine.material import Material, context_of, observe_base, observe_original, texts_of
from geoquant.privacy.refine.run import Refined, RefineSettings, refine
from geoquant.privacy.refine.state import BlockState, State

__all__ = [
    "BlockError",
    "BlockState",
    "Bounds",
    "Cloud",
    "Geometry",
    "Losses",
    "Material",
    "RefineSettings",
    "Refined",
    "State",
    "begin_geometry",
    "context_of",
    "observe_base",
    "observe_clouds",
    "observe_original",
    "refine",
    "refine_blocks",
    "texts_of",
]

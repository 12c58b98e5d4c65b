"""The key of origins.json: an entry for every number that the file holds, and none for what it does not."""

from __future__ import annotations

from dataclasses import fields

from geoquant.outliers.clipping import Clipping, ClipSplit
from geoquant.outliers.norms import NormGain, NormGains
from geoquant.outliers.origin import Origins
from geoquant.outliers.origin_key import KEY
from geoquant.outliers.outlier_ratio import OutlierRatio, OutlierRatios
from geoquant.outliers.residual import Life, Residuals
from geoquant.outliers.sinks import Sinks
from geoquant.outliers.super_weight import Effect, SuperWeight, SuperWeights
from geoquant.outliers.tails import Tails
from geoquant.report.page import finite


def paths(value, path=""):
    """The path of every leaf; null and empty lists left out: what they would hold is not to be seen there."""
    if isinstance(value, dict):
        return {leaf for name, one in value.items() for leaf in paths(one, f"{path}.{name}" if path else name)}
    if isinstance(value, list):
        return {leaf for one in value for leaf in paths(one, f"{path}[]")}
    return set() if value is None else {path}


def filled(kind, **known):
    """One with a 1 in every field that is not given."""
    return kind(**{field.name: known.get(field.name, 1) for field in fields(kind)})


def whole() -> dict:
    """What is written of origins that have one of everything."""
    effect = filled(Effect, delta=0.5, error=0.1, windows=(0.5,))
    split = filled(ClipSplit, clip=(0.5,), clipped=(0.1,), rounded=(0.1,), site="s", unclipped=0.2, error=0.1)
    site = filled(OutlierRatio, tails=filled(Tails), ratio=0.1, null=0.1, site="s")
    tables = dict.fromkeys(("mass", "value_ratio", "value_low", "logit_range", "gaussian_range"), ((1.0,),))
    stream = dict.fromkeys(("largest", "typical", "massive_cosine", "ordinary_cosine"), (1.0,))
    places = {"position": (0,), "dimension": (0,), "lives": (filled(Life),)}
    suspect = filled(SuperWeight, site="s", zeroing=effect, like_sized=(effect,), random=effect)
    origins = Origins(
        sinks=Sinks(positions=(0,), uniform=(0.1,), **tables),
        norms=NormGains((filled(NormGain, name="n", spearman=0.1),)),
        residuals=Residuals(**stream, **places, gaussian=5.0, threshold=1000.0),
        super_weights=SuperWeights((suspect,)),
        clipping=Clipping(4, (split,), (split,)),
        outliers=OutlierRatios((site,), (filled(OutlierRatio, site=None, tails=None, ratio=0.1, null=0.1),)),
        notes=("a note",),
        windows=4,
        length=256,
    )
    return finite(origins.to_dict())


def test_every_number_has_an_entry_and_every_entry_a_number():
    told = whole()
    assert told.pop("key") == KEY
    absent = {"outliers.sites[].tails", "outliers.blocks[].tails", "outliers.blocks[].site"}  # objects, or null
    assert paths(told) == set(KEY) - absent


def test_entries_say_something():
    assert all(set(one) == {"what", "unit"} and all(one.values()) for one in KEY.values())

"""A model trained with DP-SGD keeps its guarantee through quantization: post-processing. Nothing is added to the claim.

The statement is a JSON object, written by whoever trained the model:

    {"epsilon": 4.0, "delta": 1e-5, "adjacency": "one record added or removed", "mechanism": "DP-SGD", "who": "..."}

GeoQuant cannot check a training that it did not see, and every sentence says so. This remains the first thing to
recommend: a record-level guarantee at useful quality comes from training (Abadi et al. 2016), not from noise on
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from geoquant.errors import UserError
from geoquant.privacy.guarantee.adjacency import Inherited
from geoquant.privacy.guarantee.provenance import Released
from geoquant.privacy.guarantee.scope import scope_of
from geoquant.privacy.guarantee.statement import Guarantee, TrainersClaim
from geoquant.privacy.guarantee.weight_ball import Release

__all__ = ["inherit"]

TEXT, NUMBERS = ("adjacency", "mechanism", "who"), ("epsilon", "delta")


def inherit(
    statement: Path,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    trained: Collection[str],
) -> Release:
    """The tensors of a model whose trainer states a guarantee, as released values under that guarantee, unchanged.

    statement: the file above. tensors: all of the model. base: of the public base. trained: names of the tensors that
    the stated training released; every other tensor must be the base's, bit for bit.

    Raises UserError where the statement lacks a part, or a tensor is neither trained under it nor public.
    """
    try:
        text = Path(statement).read_bytes()
        claim = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"the trainer's statement cannot be read: {error}", fix="it is a JSON object") from error
    if not isinstance(claim, dict):
        raise UserError("the trainer's statement is no JSON object", got=type(claim).__name__)
    for key in (*TEXT, *NUMBERS):
        value = claim.get(key)
        if not (isinstance(value, str) and value.strip() if key in TEXT else isinstance(value, int | float)):
            raise UserError(
                f"the trainer's statement lacks {key!r}, and no guarantee is inherited without it",
                got=repr(value),
                wanted="words" if key in TEXT else "a number",
            )
    pair = float(claim["epsilon"]), float(claim["delta"])
    mechanism = TrainersClaim(claim["mechanism"], claim["who"], *pair, hashlib.sha256(text).hexdigest())
    guarantee = Guarantee(*pair, Inherited(claim["adjacency"]), mechanism, scope_of(tensors, base, trained))
    return Release({name: Released(tensors[name], guarantee) for name in trained}, guarantee)

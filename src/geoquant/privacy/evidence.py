"""All that a membership attack may look at, for the n records of one side of a split.

A new kind of evidence (scores of a shadow model) is one more field here and one more name in the `needs` of the attack
that uses it; no other attack changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from geoquant.data.records import Record
from geoquant.privacy.scores import RecordScores

__all__ = ["Evidence", "ShadowScores", "compressed_bytes", "gather"]


@dataclass(frozen=True)
class ShadowScores:
    """The n records under shadow models (privacy/shadows.py), each trained on some of them.

    mean_log_prob: nats per token, -inf for a record without scored tokens; inside: which model was trained on which
    record; lengths: scored tokens of each record.
    """

    mean_log_prob: Float[np.ndarray, "models n"]
    inside: Bool[np.ndarray, "models n"]
    lengths: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Evidence:
    """target: under the audited model; reference: under a model that never saw the records (the public base).

    zlib_bytes: of the part of each record's text that was scored, a property of the text and not of the model.
    lowered: the texts in lower case under the audited model. shadows: under models trained as the audited one was.
    What is None was not gathered.
    """

    target: RecordScores
    reference: RecordScores | None = None
    zlib_bytes: Int[np.ndarray, " n"] | None = None
    lowered: RecordScores | None = None
    shadows: ShadowScores | None = None


def gather(
    records: Sequence[Record],
    target: RecordScores,
    reference: RecordScores | None = None,
    lowered: RecordScores | None = None,
    shadows: ShadowScores | None = None,
) -> Evidence:
    """The evidence about `records`, given their scores in the same order."""
    return Evidence(target, reference, compressed_bytes(records, target), lowered, shadows)


def compressed_bytes(records: Sequence[Record], scores: RecordScores) -> Int[np.ndarray, " n"]:
    """Bytes of zlib's stream of each text, up to the last scored token; of the whole text where none was scored."""
    last = [int(scores.ends[end - 1]) if end > begin else None for begin, end in zip(scores.splits, scores.splits[1:])]
    return np.array([len(zlib.compress(r.text[:stop].encode())) for r, stop in zip(records, last, strict=True)], int)

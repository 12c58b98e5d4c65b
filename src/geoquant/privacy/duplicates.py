"""Members that occur among the non-members with small changes: what the model remembers of one, it knows of the other.

Two texts are near-duplicates if their sets of runs of five characters (lower case, white space of any kind as one
blank) have a Jaccard similarity |A & B| / |A | B| of at least 0.7: about one word changed in ten. All pairs are found,
none is estimated. Two sets that similar share at least one of the rarest |A| - ceil(0.7 |A|) + 1 elements of each, so
only pairs that meet there are compared (prefix filter: Chaudhuri, Ganti, Kaushik: A Primitive Operator for Similarity
Joins in Data Cleaning, ICDE 2006). Broder: On the Resemblance and Containment of Documents, 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from geoquant.data.records import Record

__all__ = ["THRESHOLD", "NearDuplicate", "near_duplicates"]

THRESHOLD = 0.7  # records of one template about different people stay below 0.65
RUN = 5  # characters of a shingle
BLOCK = 256  # members whose candidates are looked for at once


@dataclass(frozen=True)
class NearDuplicate:
    """A member and a non-member that are nearly the same, by the numbers of their records (lines of their files)."""

    member: int
    nonmember: int
    similarity: float


def near_duplicates(
    members: Sequence[Record], nonmembers: Sequence[Record], threshold: float = THRESHOLD
) -> tuple[NearDuplicate, ...]:
    """All pairs (member, non-member) of at least this similarity, the most similar first.

    Texts shorter than five characters have no runs and are in no pair.
    """
    reader = CountVectorizer(analyzer="char", ngram_range=(RUN, RUN), binary=True, dtype=np.int64)
    try:
        table = reader.fit_transform([" ".join(record.text.split()) for record in (*members, *nonmembers)])
    except ValueError:  # no text is that long
        return ()
    sizes = np.diff(table.indptr)
    rare = _rarest(table, sizes, threshold)
    inside, outside = table[: len(members)], table[len(members) :]
    found = []
    for begin in range(0, len(members), BLOCK):
        met = (rare[begin : min(begin + BLOCK, len(members))] @ rare[len(members) :].T).tocoo()
        one, other = met.row + begin, met.col
        for part in np.array_split(np.arange(len(one)), 1 + len(one) // 65536):
            i, j = one[part], other[part]
            common = np.asarray(inside[i].multiply(outside[j]).sum(axis=1)).ravel()
            similarity = common / (sizes[i] + sizes[len(members) + j] - common)
            # By hand 7 / 10 is 0.7; in floating point it may be a little less.
            kept = similarity >= threshold - 1e-12
            found += zip(i[kept].tolist(), j[kept].tolist(), similarity[kept].tolist())
    pairs = [NearDuplicate(_number(members, i), _number(nonmembers, j), value) for i, j, value in found]
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.member, pair.nonmember)))


def _number(side: Sequence[Record], index: int) -> int:
    """The line of the record in its file, or its place counted from 1 where it came from no file."""
    return side[index].line or index + 1


def _rarest(table: csr_matrix, sizes: Int[np.ndarray, " n"], threshold: float) -> csr_matrix:
    """Each row with nothing but its rarest entries: as many as a similar row cannot miss all of."""
    rank = np.empty(table.shape[1], np.int64)
    rank[np.argsort(np.bincount(table.indices, minlength=table.shape[1]), kind="stable")] = np.arange(table.shape[1])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((rank[table.indices], owner))
    place = np.arange(len(order)) - np.repeat(table.indptr[:-1], sizes)
    keep = place < np.repeat(sizes - np.ceil(threshold * sizes - 1e-9) + 1, sizes)
    chosen = order[keep]
    return csr_matrix((np.ones(len(chosen), np.int64), (owner[chosen], table.indices[chosen])), shape=table.shape)

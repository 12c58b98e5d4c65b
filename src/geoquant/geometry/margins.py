"""Labels dealt out anew among rows of the same blocks and kinds.

Layers of a block are alike, and layers of a kind are: labels that owe anything to either agree with features that owe
anything to it, and permuting labels freely calls that a finding. Here a permutation keeps how many of each block and
how many of each kind have the label. If `logit P(label) = a_block + b_kind`, whatever a and b, all such labelings are
equally likely (Rasch, Probabilistic models for some intelligence and attainment tests, 1960), so what features say
beyond block and kind is what they say of these labels and not of those.

Labelings are reached by trades between two blocks: of the kinds where exactly one of the two has the label, each gets
as many as before, drawn anew (Strona, Nappo, Boccacci, Fattorini, San-Miguel-Ayanz: A fast and unbiased procedure to
randomize ecological binary matrices, Nature Communications 2014). Draws start from one labeling some trades away from
the true one, which makes them exchangeable with it however few the trades are (Besag and Clifford: Generalized Monte
Carlo significance tests, Biometrika 1989).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool

__all__ = ["relabelled"]

TRADES = 8  # of each block


def relabelled(
    labels: Bool[np.ndarray, " n"],
    blocks: Sequence[object],
    kinds: Sequence[object],
    draws: int,
    generator: np.random.Generator,
) -> Iterator[Bool[np.ndarray, " n"]]:
    """So many labelings with the counts of every block and every kind. Raises ValueError where two rows share both."""
    rows, columns = (np.unique([str(one) for one in given], return_inverse=True)[1] for given in (blocks, kinds))
    if len({*zip(rows, columns)}) < len(labels):
        raise ValueError("two rows of one block and kind")
    table = np.full((rows.max() + 1, columns.max() + 1), -1)  # where there is no row
    table[rows, columns] = labels
    hub = _traded(table, generator)
    for _ in range(draws):
        yield _traded(hub, generator)[rows, columns].astype(bool)


def _traded(table: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    table = table.copy()
    count = len(table)
    first = generator.integers(count, size=TRADES * count if count > 1 else 0)
    second = (first + generator.integers(1, max(2, count), size=len(first))) % count
    for one, other in zip(first, second):
        apart = np.flatnonzero((table[one] + table[other] == 1) & (table[one] * table[other] == 0))
        drawn = generator.permutation(table[one, apart])
        table[one, apart], table[other, apart] = drawn, 1 - drawn
    return table

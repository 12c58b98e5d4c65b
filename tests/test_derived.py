"""What is remembered of tensors, and for how long."""

from __future__ import annotations

import gc
import weakref

import torch

from geoquant.outliers import derived
from geoquant.outliers.derived import eigenpairs, remembered, row_energies

CALLS = []


def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Counts how often it is asked."""
    CALLS.append(1)
    return one @ other


def test_the_same_tensors_are_asked_once_and_equal_ones_again():
    CALLS.clear()
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    first = remembered(product, one, other)
    assert remembered(product, one, other) is first
    assert len(CALLS) == 1
    assert torch.equal(remembered(product, one.clone(), other), first)
    assert len(CALLS) == 2
    assert torch.equal(remembered(product, one, other.clone()), first)
    assert len(CALLS) == 3
    assert not torch.equal(remembered(product, other, one), first)


def test_another_tensor_at_a_place_in_memory_is_another():
    one = torch.randn(3, 3)
    for size in range(50):
        other = torch.full((3, 3), float(size))
        assert torch.equal(remembered(product, one, other), one @ other)
        del other


def test_nothing_is_kept_of_what_is_gone():
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    result = weakref.ref(remembered(product, one, other))
    gc.collect()
    before = len(derived._KNOWN)
    assert result() is not None
    del one
    gc.collect()
    assert result() is None
    assert len(derived._KNOWN) < before


def test_row_energies_and_eigenpairs_are_those_of_the_definition():
    change, root = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    metric = root @ root.T
    expected = torch.stack([row @ metric @ row for row in change])
    torch.testing.assert_close(row_energies(change, metric), expected)
    values, vectors = eigenpairs(metric)
    torch.testing.assert_close((vectors * values) @ vectors.T, metric)

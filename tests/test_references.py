"""Reference values of rounding, against what follows from their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from geoquant.geometry.spectrum import spectrum_change
from geoquant.outliers.interventions import rounded
from geoquant.outliers.references import MEASURES, quartiles, reference_values


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Independent weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_every_bit_halves_the_error():
    found = reference_values(gaussian(96, 128), (3, 4, 5))
    errors = [found[bits]["relative_error"] for bits in (3, 4, 5)]
    assert all(1.7 < coarse / fine < 2.2 for coarse, fine in itertools.pairwise(errors))
    assert all(set(one) == set(MEASURES) for one in found.values())


def test_rounding_of_independent_weights_is_noise_to_the_tangent_spaces():
    """Rounding errors of independent weights have no direction, so that MD cannot tell them from noise (5%)."""
    found = reference_values(gaussian(300, 128), (3,))[3]
    assert found["distortion"] == pytest.approx(found["distortion_of_noise"], rel=0.05)


def test_spectral_numbers_are_those_of_the_singular_values():
    weight = gaussian(24, 64)
    found = reference_values(weight, (2,))[2]
    before, after = (torch.linalg.svdvals(one.double()) for one in (weight, rounded(weight, 2)))
    assert found["spectrum"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
    p, q = (one.square() / one.square().sum() for one in (before, after))
    assert found["information"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3)


def test_leading_directions_do_not_depend_on_which_side_is_longer():
    """The tall matrix with the same right singular vectors: rows turned by an orthogonal matrix."""
    before, after = gaussian(20, 50), gaussian(20, 50, seed=1) * 0.2
    turn = torch.linalg.qr(gaussian(90, 20, seed=2)).Q
    wide = spectrum_change(before, before + after, leading=5)
    tall = spectrum_change(turn @ before, turn @ (before + after), leading=5)
    assert wide.angles == pytest.approx(tall.angles, abs=1e-4)
    assert wide.relative == pytest.approx(tall.relative, rel=1e-4)


@pytest.mark.parametrize("weight", [torch.zeros(8, 70), torch.ones(1, 70), torch.ones(9, 3)])
def test_a_layer_without_structure_has_no_number_and_no_error(weight):
    for one in reference_values(weight, (2, 4)).values():
        assert all(value is None or math.isfinite(value) for value in one.values())


def test_quartiles_leave_out_what_is_unknown():
    assert quartiles([1.0, None, 3.0, 2.0]) == {"low": 1.5, "median": 2.0, "high": 2.5, "sites": 3}
    assert quartiles([None]) == {"low": None, "median": None, "high": None, "sites": 0}

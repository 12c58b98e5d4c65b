"""Spectra, subspaces and metrics before and after: closed forms, invariances, a reference library."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from geoquant.geometry.spectrum import effective_rank, principal_angles, spectrum_change
from geoquant.geometry.stability import affine_distance, gaussian_kl, ratios
from oracles.lattice import random_metric
from test_tangent import generator


def test_a_scaled_matrix_keeps_its_directions():
    matrix = torch.randn(40, 25, generator=generator())
    found = spectrum_change(matrix, 1.5 * matrix, leading=6)
    assert found.relative == pytest.approx(0.5)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert max(found.angles) < 1e-7
    assert found.ranks[0] == pytest.approx(found.ranks[1])


def test_a_turned_subspace_has_the_angle_it_was_turned_by():
    values = torch.tensor([5.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    for angle in (1e-9, 0.01, 1.2):
        turn = torch.eye(4, dtype=torch.float64)
        cos, sin = math.cos(angle), math.sin(angle)
        turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = cos, -sin, sin, cos
        found = spectrum_change(torch.diag(values), torch.diag(values) @ turn, leading=2)
        assert found.relative == pytest.approx(0, abs=1e-12)
        assert found.angles[1] == pytest.approx(angle, rel=1e-6)
        assert found.angles[0] == pytest.approx(0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 5))
def test_angles_are_those_of_scipy(seed, k):
    one, other = (
        torch.linalg.qr(torch.randn(9, k, generator=generator(seed + place), dtype=torch.float64)).Q for place in (0, 1)
    )
    expected = torch.from_numpy(subspace_angles(one.numpy(), other.numpy()).copy()).flip(0)
    torch.testing.assert_close(principal_angles(one, other), expected, rtol=1e-6, atol=1e-7)


def test_kl_of_spectra():
    before, after = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))
    assert spectrum_change(before, after, 1).kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)


def test_ratios_of_diagonal_metrics():
    one, other = torch.tensor([1.0, 2, 4]), torch.tensor([2.0, 2, 1])
    torch.testing.assert_close(
        ratios(torch.diag(one), torch.diag(other)), torch.tensor([0.25, 1, 2], dtype=torch.float64)
    )
    logs = torch.tensor([0.25, 1, 2]).log()
    assert affine_distance(torch.diag(one), torch.diag(other)) == pytest.approx(logs.square().mean().sqrt().item())


def test_distances_see_no_basis_and_no_unit():
    one, other = random_metric(8, 0), random_metric(8, 1)
    change = torch.randn(8, 8, generator=generator(2), dtype=torch.float64)
    turned = change @ one @ change.T, change @ other @ change.T
    assert affine_distance(*turned) == pytest.approx(affine_distance(one, other))
    assert affine_distance(other, one) == pytest.approx(affine_distance(one, other))
    assert gaussian_kl(*turned) == pytest.approx(gaussian_kl(one, other))
    assert affine_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_kl_is_that_of_torch():
    one, other = random_metric(5, 3, decades=1.0), random_metric(5, 4, decades=1.0)
    normals = [
        torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance_matrix=m) for m in (one, other)
    ]
    expected = torch.distributions.kl_divergence(*normals).item() / 5
    assert gaussian_kl(one, other) == pytest.approx(expected)

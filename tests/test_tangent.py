"""Tangent spaces: exact neighbours, planes and spheres of known dimension, projections against dense ones."""

from __future__ import annotations

import pytest
import torch

from geoquant.geometry.dimension import local_dimension, two_nn
from geoquant.geometry.nulls import gaussian_cloud, shuffled_columns
from geoquant.geometry.tangent import frames, neighbours


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embedded(points, dimension, seed=0):
    """The points in a random subspace of a larger space, away from its origin."""
    basis = torch.linalg.qr(torch.randn(dimension, points.shape[1], generator=generator(seed))).Q
    return points @ basis.T + torch.randn(dimension, generator=generator(seed + 1)), basis


def sphere(n, dimension, radius=1.0, seed=0):
    points = torch.randn(n, dimension + 1, generator=generator(seed))
    return radius * points / points.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 77, 12])])
def test_neighbours_are_the_nearest_others(rows, monkeypatch):
    monkeypatch.setattr("geoquant.geometry.tangent.PANEL", 900)  # several panels
    points = torch.randn(90, 7, generator=generator()) + 100
    found = neighbours(points, 5, rows)
    distances = torch.cdist(points.double(), points.double())
    distances.fill_diagonal_(torch.inf)
    expected = distances if rows is None else distances[rows]
    assert torch.equal(found, expected.argsort(1)[:, :5])


def test_there_must_be_others():
    with pytest.raises(ValueError, match="each of 5 points has 4 others, not 5"):
        neighbours(torch.zeros(5, 3), 5)


@pytest.mark.parametrize("d", [1, 3, 6])
def test_the_tangent_space_of_a_plane_is_the_plane(d):
    points, basis = embedded(torch.rand(300, d, generator=generator(2)), 20)
    for part in frames(points, k=16, share=1.0):
        assert (part.dims == d).all()
        inside = torch.randn(len(part.points), d, generator=generator(3)) @ basis.T
        torch.testing.assert_close(part.normal_squares(inside)[0], torch.zeros(len(inside)), rtol=0, atol=1e-4)
        across = torch.randn(len(part.points), 20, generator=generator(4))
        across -= across @ basis @ basis.T
        torch.testing.assert_close(part.normal_squares(inside, across)[1], across.square().sum(1), rtol=1e-4, atol=0)


def test_tangents_of_a_sphere_are_normal_to_its_radius():
    points, basis = embedded(sphere(4000, 2), 12)
    radii = sphere(4000, 2) @ basis.T
    for part in frames(points, k=24):
        assert (part.dims == 2).all()
        (normal,) = part.normal_squares(radii[part.points])
        assert normal.min() > 0.98


def test_bases_are_orthonormal_and_projections_those_of_dense_matrices(monkeypatch):
    monkeypatch.setattr("geoquant.geometry.tangent.PANEL", 4000)
    points, vectors = (torch.randn(60, 9, generator=generator(seed)) for seed in (0, 1))
    seen = []
    for part in frames(points, k=8, share=0.8):
        (squares,) = part.normal_squares(vectors[part.points])
        for own, basis, dims, left in zip(part.points, part.bases, part.dims, squares, strict=True):
            used = basis[:dims].double()
            assert not basis[dims:].any()
            torch.testing.assert_close(used @ used.T, torch.eye(int(dims)).double(), rtol=0, atol=1e-5)
            vector = vectors[own].double()
            expected = (vector - used.T @ (used @ vector)).square().sum()
            torch.testing.assert_close(left.double(), expected, rtol=1e-4, atol=1e-6)
            cloud = points[neighbours(points, 8)[own]].double()
            variances = torch.linalg.svdvals(cloud - cloud.mean(0)).square()
            explained = variances.cumsum(0) / variances.sum()
            assert explained[dims - 1] >= 0.8 > explained[dims - 2]
            seen.append(int(own))
    assert seen == list(range(60))


def test_copies_of_one_point_have_no_tangent():
    for part in frames(torch.ones(10, 4), k=5):
        assert not part.dims.any()
        assert torch.equal(part.normal_squares(torch.ones(10, 4))[0], torch.full((10,), 4.0))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_two_neighbours_know_the_dimension(d):
    points, _ = embedded(torch.rand(3000, d, generator=generator(5)), 30)
    assert two_nn(points) == pytest.approx(d, rel=0.1)
    with_copies = torch.cat([points, points[:200]])
    assert two_nn(with_copies) == pytest.approx(d, rel=0.1)
    assert two_nn(7 * points) == pytest.approx(two_nn(points), rel=1e-4)


def test_two_neighbours_need_points():
    with pytest.raises(ValueError, match="at least three"):
        two_nn(torch.zeros(50, 3))


def test_the_local_dimension_of_noise_is_set_by_the_number_of_neighbours():
    """What a Gaussian cloud has is the null of every other figure."""
    cloud = torch.randn(400, 200, generator=generator(6))
    assert local_dimension(cloud, k=32) == pytest.approx(0.93 * 31, abs=1)
    sheet, _ = embedded(torch.rand(400, 3, generator=generator(7)), 200)
    assert local_dimension(sheet, k=32) == pytest.approx(3, abs=0.1)


def test_nulls_keep_what_they_say():
    mixing = torch.randn(6, 6, generator=generator(8))
    points = torch.rand(4000, 6, generator=generator(9)) @ mixing + 5
    cloud = gaussian_cloud(points, generator(1))
    torch.testing.assert_close(cloud.mean(0), points.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(cloud.T.cov(), points.T.cov(), rtol=0, atol=0.1 * points.T.cov().abs().max().item())
    # Kurtosis of uniform marginals is 1.8 before mixing; that of the cloud is a Gaussian's.
    flat = (cloud - cloud.mean(0)) / cloud.std(0)
    torch.testing.assert_close(flat.pow(4).mean(0), torch.full((6,), 3.0), rtol=0, atol=0.35)
    mixed = shuffled_columns(points, generator(2))
    assert torch.equal(mixed.sort(0).values, points.sort(0).values)
    off = torch.corrcoef(mixed.T) - torch.eye(6)
    assert off.abs().max() < 0.08
    assert (torch.corrcoef(points.T) - torch.eye(6)).abs().max() > 0.3

"""Pictures against SVD and planted clusters, labels that mean nothing, autoencoders on flat and on curved rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoquant.geometry.encoder import compare_encoders
from geoquant.geometry.pictures import clusters, picture, principal
from test_tangent import embedded, generator


def blobs(n=40, dimension=20, apart=6.0, seed=0):
    """Three clouds around the first three axes."""
    labels = np.repeat([0, 1, 2], n)
    points = torch.randn(3 * n, dimension, generator=generator(seed))
    points[torch.arange(3 * n), torch.from_numpy(labels)] += apart
    return points, labels


def test_principal_components_are_those_of_sklearn():
    from sklearn.decomposition import PCA

    points = torch.randn(60, 12, generator=generator(1)) @ torch.diag(torch.linspace(3, 0.5, 12)) + 7
    coordinates, basis, share = principal(points, 4)
    reference = PCA(4, svd_solver="full").fit(points.double().numpy())
    signs = np.sign((basis.T.numpy() * reference.components_).sum(1))
    np.testing.assert_allclose(basis.T.numpy() * signs[:, None], reference.components_, atol=1e-9)
    np.testing.assert_allclose(coordinates.numpy() * signs, reference.transform(points.double().numpy()), atol=1e-8)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())
    flipped = principal(-points, 4)
    torch.testing.assert_close(flipped[1], basis)
    torch.testing.assert_close(flipped[0], -coordinates)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_planted_clusters_are_seen(method):
    points, labels = blobs()
    found = picture(points, labels, method, permutations=19)
    assert found.coordinates.shape == (120, 2)
    assert found.seen.silhouette > 0.6
    assert found.seen.davies_bouldin < 0.6
    assert found.seen.p_silhouette == found.seen.p_davies_bouldin == found.among.p_silhouette == 0.05
    assert found.seen.null_silhouette < 0.05
    assert found.seen.null_davies_bouldin > 2
    assert found.seen.counts == {0: 40, 1: 40, 2: 40}
    again = picture(points, labels, method, permutations=3)
    np.testing.assert_array_equal(again.coordinates, found.coordinates)
    if method == "pca":
        np.testing.assert_array_equal(found.coordinates, principal(points, 2)[0].numpy())
        assert found.explained == pytest.approx(principal(points, 2)[2])
    else:
        assert np.isnan(found.explained)


def test_some_rows_stand_for_all():
    points, labels = blobs()
    found = picture(points, labels, most=50, permutations=3)
    assert len(found.coordinates) == len(set(found.rows.tolist())) == sum(found.seen.counts.values()) == 50
    assert found.seen.counts == {kind: int((labels[found.rows] == kind).sum()) for kind in (0, 1, 2)}
    assert found.seen.silhouette > 0.6
    expected, _, _ = principal(points[torch.from_numpy(found.rows)], 2)
    np.testing.assert_array_equal(found.coordinates, expected.numpy())


def test_labels_that_mean_nothing_pass_at_the_stated_rate():
    """20 clouds: p at most 0.1 in about two of them, in eight or more with probability below 1e-3, by either figure."""
    low = np.zeros(2)
    for seed in range(20):
        points, labels = blobs(10, 5, apart=0.0, seed=seed)
        found = clusters(points.numpy(), labels, permutations=9, seed=seed)
        low += np.array([found.p_silhouette, found.p_davies_bouldin]) <= 0.1
    assert low.max() < 8


def test_silhouette_and_davies_bouldin_by_hand():
    """Two pairs on a line: 0, 1 and 10, 13."""
    found = clusters(np.array([[0.0], [1], [10], [13]]), np.array([0, 0, 1, 1]), permutations=2)
    each = [1 - 1 / 11.5, 1 - 1 / 10.5, 1 - 3 / 9.5, 1 - 3 / 12.5]
    assert found.silhouette == pytest.approx(np.mean(each))
    assert found.davies_bouldin == pytest.approx((0.5 + 1.5) / (11.5 - 0.5))


def test_what_cannot_be_pictured():
    points, labels = blobs()
    with pytest.raises(ValueError, match=r"one of .* but got 'umap'"):
        picture(points, labels, "umap")
    with pytest.raises(ValueError, match="two labels at least"):
        clusters(points.numpy(), np.zeros(120, dtype=int))
    with pytest.raises(ValueError, match="no 30 components"):
        compare_encoders(torch.zeros(40, 100), 30)


def test_on_a_subspace_an_autoencoder_does_what_pca_does():
    flat, _ = embedded(torch.randn(500, 4, generator=generator(2)), 20)
    found = compare_encoders(flat + 0.1 * torch.randn(500, 20, generator=generator(3)), 4, hidden=32, steps=250)
    assert found.rows == (400, 100)
    train, test = found.found.pca
    assert test > 0.93
    assert abs(train - test) < 0.03
    assert found.found.random[1] > test - 0.03
    assert found.found.started[1] == pytest.approx(test, abs=0.01)
    assert abs(found.found.gain) < 0.03
    again = compare_encoders(flat, 2, hidden=16, steps=3, seed=4)
    assert again == compare_encoders(flat, 2, hidden=16, steps=3, seed=4)


def test_pca_shares_are_those_of_the_spectrum():
    """On its own training rows PCA keeps the leading eigenvalues' share of the variance."""
    points = torch.randn(300, 10, generator=generator(5)) @ torch.diag(torch.linspace(3, 0.5, 10))
    found = compare_encoders(points, 3, hidden=8, steps=1).found
    variances = torch.linspace(3, 0.5, 10).square()
    assert found.pca[0] == pytest.approx((variances[:3].sum() / variances.sum()).item(), abs=0.03)
    assert found.random[0] < found.pca[0]  # nothing of this width does better on these rows, and least after one step


def test_on_a_curve_it_wins_by_more_than_on_its_null():
    angles = 1.5 * torch.pi * torch.rand(600, 1, generator=generator(6))
    curve = torch.cat([angles.cos(), angles.sin(), (2 * angles).cos(), (2 * angles).sin()], dim=1)
    points, _ = embedded(curve + 0.02 * torch.randn(600, 4, generator=generator(7)), 12)
    found = compare_encoders(points, 1, hidden=32, steps=250)
    assert found.found.pca[1] < 0.5
    assert found.found.gain > 0.3
    assert found.found.gain > 5 * found.found.error
    assert found.null.gain < found.found.gain / 2  # not zero: a bent line can wind through four dimensions
    assert found.found.started[1] > found.found.random[1]

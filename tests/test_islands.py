"""Isolation: the outlier factor by its definition, planted islands, and clouds that have none."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from geoquant.geometry.islands import density_clusters, islands, local_outlier_factor, rank_correlation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n=300, dimension=8, seed=0):
    return torch.randn(n, dimension, generator=generator(seed))


def by_definition(points, k):
    """Reachability distances and densities, one point at a time."""
    distances = torch.cdist(points.double(), points.double())
    distances.fill_diagonal_(torch.inf)
    near = distances.argsort(1)[:, :k]
    reach = distances.gather(1, near)[:, -1]
    density = []
    for i, others in enumerate(near):
        density.append(1 / sum(max(reach[o].item(), distances[i, o].item()) for o in others) * k)
    return torch.tensor([sum(density[o] for o in others) / k / density[i] for i, others in enumerate(near)])


@pytest.mark.parametrize("k", [2, 10])
def test_the_factor_is_the_one_defined(k):
    points = cloud(60)
    points[3] *= 6
    torch.testing.assert_close(local_outlier_factor(points, k), by_definition(points, k).double(), rtol=1e-5, atol=0)


def test_planted_islands_are_found_and_little_else():
    points = cloud()
    planted = torch.tensor([4, 90, 211])
    points[planted] *= 5
    found = islands(points, generator(1))
    assert found.isolated[planted].all()
    assert found.p[planted].max() <= 1 / 901 + 1e-12
    assert found.isolated.sum() - 3 <= 9  # of 297 at level 1%: 3 expected, 9 exceeded with probability below 2e-3


def test_points_of_a_gaussian_cloud_are_isolated_at_the_stated_rate():
    shares = [islands(cloud(seed=seed), generator(seed + 50), level=0.05).isolated.double().mean() for seed in range(8)]
    assert 0.02 < sum(shares) / 8 < 0.08  # 2400 points, binomial deviation 0.0045, and that of the cutoff


def test_in_many_dimensions_the_factor_is_the_length_until_all_are_as_long():
    points = cloud(dimension=40) * torch.linspace(1, 3, 300)[:, None]
    raw, unit = islands(points, generator(4)), islands(points, generator(4), unit=True)
    assert raw.lengths > 0.95
    assert abs(rank_correlation(unit.factor, points.norm(dim=1))) < 0.2  # deviation 0.06 by chance


def test_a_direction_of_its_own_is_isolated_whatever_its_length():
    points = cloud(dimension=3)
    points = points / points.norm(dim=1, keepdim=True)
    points[:, 2] = points[:, 2].abs() + 2
    points *= torch.linspace(1, 30, 300)[torch.randperm(300, generator=generator(3)), None]
    points[7] = torch.tensor([0.0, 0.0, -1.0])
    raw, unit = islands(points, generator(4)), islands(points, generator(4), unit=True)
    assert unit.factor.argmax() == 7
    assert unit.isolated[7]
    assert raw.factor.argmax() != 7


def test_the_correlation_with_length_is_that_of_scipy():
    one, other = cloud(40, 2).T
    other[5] = other[6]
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation(one, torch.ones(40)) != rank_correlation(one, torch.ones(40))
    points = cloud()
    found = islands(points, generator(1))
    factor = local_outlier_factor(points)
    length = (points - points.mean(0)).norm(dim=1)
    assert found.lengths == pytest.approx(spearmanr(factor, length).statistic, abs=1e-6)
    assert found.lengths > 0.7
    assert found.null_lengths > 0.7


def test_clusters_are_found_and_a_cloud_is_mostly_noise():
    points = cloud(200, 4) * 0.2
    points[:60] += 5
    points[60:130] -= 5
    points[199] = torch.tensor([0.0, 30.0, 0.0, 0.0])
    labels = density_clusters(points)
    found = islands(points, generator(2))
    assert found.clusters == 3
    assert labels[199] == -1
    for part in (slice(0, 60), slice(60, 130), slice(130, 199)):
        kinds, counts = labels[part].unique(return_counts=True)
        assert counts.max() > 0.9 * counts.sum()
        assert kinds[counts.argmax()] >= 0
    assert found.noise == pytest.approx((labels < 0).double().mean().item())
    assert found.noise < 0.02 < 0.1 < found.null_noise  # a Gaussian cloud has "clusters" too
    flat = islands(cloud(300, 60), generator(3))
    assert flat.noise > 0.8
    assert flat.null_noise > 0.8


def test_there_must_be_others():
    with pytest.raises(ValueError, match="each of 20 points has 19 others, not 20"):
        islands(torch.randn(20, 3), generator())

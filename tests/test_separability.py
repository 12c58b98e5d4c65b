"""Kinds that are apart, kinds that only a curved border parts, and no kinds at all."""

from __future__ import annotations

import numpy as np
import pytest

from geoquant.geometry.separability import separability


def cloud(seed=0, n=120, features=4):
    generator = np.random.default_rng(seed)
    return generator, generator.standard_normal((n, features)), np.arange(n) < n // 3


def test_planted_clusters_are_found_whatever_the_units():
    _, points, labels = cloud()
    points[labels] += 4
    found = separability(points * [1, 1e6, 1e-6, 3], labels, permutations=19)
    assert found.silhouette > 0.5
    assert found.davies_bouldin < 0.8
    assert min(found.auc.values()) > 0.99
    assert max(found.p.values()) == 0.05
    assert found.rows == (80, 40)


def test_a_shell_around_a_ball_is_no_cluster_but_can_be_told():
    _, points, labels = cloud(1)
    points[labels] *= 4 / np.linalg.norm(points[labels], axis=1, keepdims=True)
    found = separability(points, labels, permutations=19)
    assert found.auc["neighbours"] > 0.9
    assert found.p["neighbours"] == 0.05
    assert found.auc["linear"] < 0.75


def test_labels_that_mean_nothing_pass_at_the_stated_rate():
    """12 clouds without kinds: a p of at most 0.1 in about one of them, in six with probability below 1e-3."""
    low = 0
    for seed in range(12):
        generator, points, labels = cloud(seed, n=40)
        low += separability(points, generator.permutation(labels), permutations=9, seed=seed).p["silhouette"] <= 0.1
    assert low < 6


def test_too_few_rows_and_no_numbers():
    _, points, labels = cloud(n=60)
    with pytest.raises(ValueError, match="at least 5 rows"):
        separability(points, np.arange(60) < 4)
    points[3, 2] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        separability(points, labels)

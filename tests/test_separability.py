"""Kinds that are apart, kinds that only a curved border parts, and no kinds at all."""

from __future__ import annotations

import numpy as np
import pytest

from geoquant.geometry.margins import relabelled
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


# ---- rows in blocks and kinds


def layered(seed, blocks=12, kinds=6, told=0.0):
    """Layers whose chance of the label is their block's and their kind's, as features are in part; `told`: how far the
    first feature knows the label itself.
    """
    generator = np.random.default_rng(seed)
    depth, sort = 1.5 * generator.standard_normal(blocks).cumsum(), generator.standard_normal(kinds)
    logits = (depth - depth.mean())[:, None] + sort
    labels = generator.random((blocks, kinds)) < 1 / (1 + np.exp(-logits))
    features = generator.standard_normal((blocks, kinds, 3))
    features[..., 0] += told * labels
    features[..., 1] += logits
    places = {"blocks": np.repeat(np.arange(blocks), kinds), "kinds": np.tile(np.arange(kinds), blocks)}
    return features.reshape(-1, 3), labels.ravel(), places


def test_p_is_even_where_labels_owe_all_to_their_place_and_not_if_dealt_out_freely():
    """By how far apart the means of the second feature are. 100 models, 19 draws each: p in each fifth of [0, 1] in 20
    of them on average, in 9 to 33 with all but 2e-3; dealt out freely, p is 0.05 in more than half.
    """
    fifths, free = np.zeros(5), 0
    for seed in range(100):
        features, labels, places = layered(seed)
        generator = np.random.default_rng(1000 + seed)

        def apart(kinds, values=features[:, 1]):
            return values @ kinds

        found = apart(labels)
        # A coin decides between equals, or p could not be even.
        dealt = [apart(one) for one in relabelled(labels, **places, draws=19, generator=generator)]
        above = sum(one > found + 1e-9 for one in dealt)
        equal = sum(abs(one - found) <= 1e-9 for one in dealt)
        fifths[(above + generator.integers(equal + 1)) // 4] += 1
        free += all(apart(generator.permutation(labels)) < found for _ in range(19))
    assert ((fifths >= 9) & (fifths <= 33)).all(), fifths
    assert free > 50


def test_the_verdict_of_classifiers_is_as_sure_of_nothing():
    """8 models: p of at most 0.2 by place in fewer than 5 (or more with p = 1e-2), dealt out freely in at least 5."""
    placed = free = models = 0
    for seed in range(40):
        features, labels, places = layered(seed)
        if models < 8 and min(labels.sum(), (~labels).sum()) >= 12:
            models += 1
            placed += separability(features, labels, **places, permutations=4, seed=seed).p["linear"] <= 0.2
            free += separability(features, labels, permutations=4, seed=seed).p["linear"] <= 0.2
    assert models == 8
    assert placed < 5 <= free


def test_what_features_know_beyond_their_place_is_found():
    features, labels, places = layered(3, told=4.0)
    found = separability(features, labels, **places, permutations=19)
    assert found.p["linear"] == 0.05
    assert found.auc["linear"] > 0.9
    assert found.auc["linear"] > found.chance["linear"] + 0.05


def test_what_the_place_says_whole_leaves_nothing_to_find():
    features, _, places = layered(3, told=4.0)
    features[:, 0] += 9 * (places["blocks"] < 6)
    found = separability(features, places["blocks"] < 6, **places, permutations=9)
    assert found.auc["linear"] > 0.99
    assert set(found.p.values()) == {1.0}


def test_dealt_labels_keep_their_counts_and_reach_every_such_labeling_alike():
    """3 blocks of 3 kinds with one label each: six labelings; 1,200 draws, chi-squared with five degrees below 20.5
    (p = 1e-3). Each starts from the same labeling, so that a chain too short would show.
    """
    blocks, kinds = np.repeat(range(3), 3), np.tile(range(3), 3)
    labels = np.eye(3, dtype=bool).ravel()
    generator, counts = np.random.default_rng(0), {}
    for _ in range(40):
        for one in relabelled(labels, blocks, kinds, 30, generator):
            table = one.reshape(3, 3)
            assert (table.sum(0) == 1).all()
            assert (table.sum(1) == 1).all()
            counts[tuple(one)] = counts.get(tuple(one), 0) + 1
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5


def test_kinds_that_a_block_lacks_stay_away_and_places_are_taken_once():
    blocks, kinds = [0, 0, 0, 1, 1, 2, 2], ["a", "b", "c", "a", "b", "b", "c"]
    labels = np.array([1, 0, 1, 0, 1, 0, 1], bool)
    for one in relabelled(labels, blocks, kinds, 50, np.random.default_rng(1)):
        for given in (blocks, kinds):
            for name in set(given):
                own = np.array([place == name for place in given])
                assert one[own].sum() == labels[own].sum()
    with pytest.raises(ValueError, match="two rows of one block and kind"):
        next(relabelled(labels, blocks, ["a"] * 7, 1, np.random.default_rng(1)))
    with pytest.raises(ValueError, match="one block"):
        separability(np.ones((12, 1)), np.arange(12) < 6, blocks=[0] * 12, kinds=range(12))

"""Perturbation response: the noise, planted responses that differ or do not, and the density of the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.geometry.density import density
from geoquant.outliers.prm import (
    Response,
    Trajectories,
    common_length,
    gathered,
    noise,
    null_class,
    separation,
    trajectories,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model(seed=0):
    """Weights of two sites of different size and scale, and classes of very different size."""
    draw = generator(seed)
    weights = {"a": torch.randn(12, 20, generator=draw), "b": 7 * torch.randn(8, 16, generator=draw)}
    few, many, both = ({name: torch.zeros(w.shape, dtype=torch.bool) for name, w in weights.items()} for _ in range(3))
    few["a"][:2, :5] = True
    many["b"][2:] = True
    both["a"][5:], both["b"][:2] = True, True
    return weights, {"few": few, "many": many, "both": both}


def planted(seed=0, classes=("one", "two"), shift=0.0, seeds=5, rhos=3, twist=None):
    """Trajectories drawn at random, correlated within; those of the last class are shifted."""
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((2 * rhos, 2 * rhos))
    points = draw.standard_normal((len(classes), seeds, 2 * rhos)) @ mixing
    points[-1] += shift * np.abs(mixing).sum(0) / 3
    if twist is not None:
        points = twist(points)
    return Trajectories(classes, (0.1,) * rhos, (1.0,) * rhos, points.reshape(len(classes), seeds, rhos, 2), {})


@given(seed=st.integers(0, 99), rho=st.floats(1e-4, 10))
@settings(max_examples=15, deadline=None)
def test_noise_is_as_long_for_every_class_and_on_its_members_only(seed, rho):
    weights, classes = model(seed)
    length = common_length(weights, classes, rho)
    for members in classes.values():
        found = noise(weights, members, length, generator(seed))
        assert math.sqrt(sum(part.double().square().sum() for part in found.values())) == pytest.approx(length)
        for site, part in found.items():
            assert torch.equal(part != 0, members[site])


def test_the_common_length_is_the_shortest_and_noise_follows_the_scale_of_its_site():
    weights, classes = model()
    rms = {name: w.square().mean().sqrt().item() for name, w in weights.items()}
    expected = 0.1 * min(rms["a"] * 10**0.5, rms["b"] * 96**0.5)
    assert common_length(weights, classes, 0.1) == pytest.approx(expected, rel=1e-6)
    drawn = [noise(weights, classes["both"], 1.0, generator(seed)) for seed in range(300)]
    sizes = {
        site: torch.stack([part[site][classes["both"][site]] for part in drawn]).square().mean().sqrt().item()
        for site in weights
    }
    assert sizes["b"] / sizes["a"] == pytest.approx(rms["b"] / rms["a"], rel=0.05)
    assert torch.stack([part["a"] for part in drawn]).mean().abs() < 3 / (300 * 84) ** 0.5


def test_a_null_class_is_as_many_weights_of_the_same_sites():
    _, classes = model()
    for members in classes.values():
        found = null_class(members, generator(3))
        assert {site: int(mask.sum()) for site, mask in found.items()} == {
            site: int(mask.sum()) for site, mask in members.items()
        }
    assert not torch.equal(found["a"], members["a"])


def test_trajectories_are_one_draw_scaled_and_measured_as_given():
    weights, classes = model()
    seen = []

    def measure(changes):
        seen.append({site: part.clone() for site, part in changes.items()})
        size = sum(part.square().sum().item() for part in changes.values())
        return Response(nll=size, nll_se=0.5, auc=-0.25, auc_se=0.125)

    steps = []
    found = trajectories(
        weights,
        classes,
        measure,
        rhos=(0.1, 0.4),
        seeds=5,
        progress=lambda phase, done, total, note: steps.append(done),
    )
    assert found.points.shape == (3, 5, 2, 2)
    assert steps == list(range(1, 31))
    assert found.lengths[1] == pytest.approx(4 * found.lengths[0])
    np.testing.assert_allclose(found.points[..., 1], -2)
    squares = np.square(found.lengths)
    np.testing.assert_allclose(found.points[..., 0], np.broadcast_to(squares / 0.5, (3, 5, 2)), rtol=1e-5)
    for low, high in zip(seen[::2], seen[1::2]):
        for site in low:
            torch.testing.assert_close(high[site], 4 * low[site])
    draws = [torch.cat([part.flatten() for part in one.values()]) for one in seen[:10:2]]
    assert len({tuple(draw.tolist()) for draw in draws}) == 5
    assert found.responses["few", 0, 0.1].nll == pytest.approx(squares[0], rel=1e-5)


def test_responses_measured_one_by_one_are_gathered_in_their_places():
    draw = np.random.default_rng(4)
    keys = [(name, seed, rho) for seed in (3, 5) for name in ("b", "a", "c") for rho in (0.2, 0.1)]
    responses = {key: Response(draw.normal(), 0.5, draw.normal(), 0.25) for key in keys}
    found = gathered(responses, (2.0, 1.0))
    assert (found.classes, found.rhos, found.lengths) == (("b", "a", "c"), (0.2, 0.1), (2.0, 1.0))
    assert found.points.shape == (3, 2, 2, 2)
    for (name, seed, rho), one in responses.items():
        place = found.classes.index(name), (3, 5).index(seed), found.rhos.index(rho)
        assert found.points[place].tolist() == [one.nll / 0.5, one.auc / 0.25]
    del responses["a", 5, 0.1]
    with pytest.raises(ValueError, match=r"\('a', 5, 0.1\), and 0 more"):
        gathered(responses, (2.0, 1.0))


def test_equal_responses_are_called_apart_at_the_stated_rate():
    """200 pairs of one distribution: p at most 0.1 in 20 of them, above 33 with probability below 2e-3."""
    p = [separation(planted(seed), permutations=99, seed=seed)["one", "two"].p for seed in range(200)]
    assert 6 <= sum(value <= 0.1 for value in p) <= 33
    assert 2 <= sum(value <= 0.05 for value in p) <= 20
    assert min(p) >= 1 / 100


def test_responses_of_a_real_sensitivity_are_found_and_null_classes_are_not():
    """A quadratic loss that is steep in one class: its noise costs more than as long noise elsewhere."""
    weights, classes = model()
    steep = {site: 1 + 30 * mask for site, mask in classes["few"].items()}

    def response(seed):
        draw = np.random.default_rng(seed)

        def measure(changes):
            loss = sum((steep[site] * part.square()).sum().item() for site, part in changes.items())
            return Response(loss + 0.01 * draw.standard_normal(), 0.01, 0.02 * draw.standard_normal(), 0.02)

        return measure

    found = separation(trajectories(weights, classes, response(0), rhos=(0.3, 0.6), seeds=6), permutations=999)
    assert found["few", "many"].p < 0.02
    assert found["few", "many"].p_holm < 0.05
    assert found["few", "many"].distance > 3 * found["many", "both"].distance
    assert found["many", "both"].p > 0.05
    other = {"few": null_class(classes["many"], generator(1)), "again": null_class(classes["many"], generator(2))}
    alike = separation(trajectories(weights, other, response(1), rhos=(0.3, 0.6), seeds=6), permutations=199)
    assert alike["few", "again"].p > 0.05


def test_shifted_responses_are_found():
    apart = [separation(planted(seed, shift=2.0), permutations=99)["one", "two"].p for seed in range(40)]
    assert sum(value <= 0.05 for value in apart) >= 36


def test_the_distance_is_that_of_mahalanobis_and_knows_no_unit(monkeypatch):
    of = planted(3, seeds=9)
    plain = separation(of, permutations=9)["one", "two"]
    scales = np.array([1e-3, 1, 10, 1e4, 5, 0.1])
    scaled = separation(planted(3, seeds=9, twist=lambda rows: rows * scales + 7), permutations=9)["one", "two"]
    assert scaled.distance == pytest.approx(plain.distance, rel=1e-3)
    monkeypatch.setattr("geoquant.outliers.prm.RIDGE", 0.0)
    rows = of.points.reshape(2, 9, -1)
    covariance = (np.cov(rows[0].T) + np.cov(rows[1].T)) / 2
    gap = rows[0].mean(0) - rows[1].mean(0)
    expected = (gap @ np.linalg.inv(covariance) @ gap) ** 0.5
    assert separation(of, permutations=9)["one", "two"].distance == pytest.approx(expected, rel=1e-6)


def test_several_pairs_are_corrected_by_holm():
    found = separation(planted(1, classes=("one", "two", "three"), shift=4.0), permutations=499)
    p = sorted(found.values(), key=lambda pair: pair.p)
    assert [pair.p_holm for pair in p] == pytest.approx(
        [min(1, 3 * p[0].p), max(min(1, 3 * p[0].p), 2 * p[1].p), max(3 * p[0].p, 2 * p[1].p, p[2].p)]
    )
    assert found["one", "three"].p_holm < 0.05
    assert found["two", "three"].p_holm < 0.05
    assert set(found) == {("one", "two"), ("one", "three"), ("two", "three")}


def test_trajectories_that_are_all_the_same_are_not_apart():
    found = separation(planted(twist=np.zeros_like), permutations=19)["one", "two"]
    assert found.distance == 0
    assert found.p == 1


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="at least two trajectories"):
        separation(planted(seeds=1))
    weights, classes = model()
    with pytest.raises(ValueError, match="class 'empty' has no weights"):
        common_length(weights, {**classes, "empty": {"a": torch.zeros(12, 20, dtype=torch.bool)}}, 0.1)
    for bad in ((0.1, 0.0, 0.0, 0.1), (0.0, 0.1, float("nan"), 0.1), (0.0, -1.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="standard error above zero"):
            Response(*bad)
    assert Response(0.2, 0.1, 0.0, 0.0).standardised == (2.0, 0.0)


def test_the_density_is_the_sum_of_its_kernels_and_integrates_to_one():
    points = np.random.default_rng(0).standard_normal((40, 2)) * [3, 1e-4]
    found = density(points)
    width = np.cov(points.T) * 40 ** (-2 / 6)  # Scott: n^(-1/(d+4)), squared
    inverse = np.linalg.inv(width)
    for i, j in ((10, 20), (32, 32), (50, 40)):
        gaps = np.array([found.x[i], found.y[j]]) - points
        kernels = np.exp(-0.5 * np.einsum("nd,de,ne->n", gaps, inverse, gaps))
        expected = kernels.mean() / (2 * np.pi * np.linalg.det(width) ** 0.5)
        assert found.values[i, j] == pytest.approx(expected, rel=1e-6)
    cell = (found.x[1] - found.x[0]) * (found.y[1] - found.y[0])
    assert found.values.sum() * cell == pytest.approx(1, abs=0.02)


def test_modes_are_where_the_points_are():
    draw = np.random.default_rng(1)
    centres = np.array([[0.0, 0.0], [10.0, 400.0]])
    points = np.concatenate([centres[0] + draw.normal(size=(60, 2)), centres[1] + draw.normal(size=(30, 2)) * [1, 40]])
    found = density(points)
    assert len(found.modes) == 2
    np.testing.assert_allclose(found.modes, centres, atol=1.5, rtol=0.1)
    assert (np.diff(found.heights) < 0).all()
    assert found.heights[0] == pytest.approx(found.values.max())


def test_points_without_a_plane_have_no_density():
    line = np.stack([np.arange(9.0), 2 * np.arange(9.0)], axis=1)
    flat = np.stack([np.arange(9.0), np.ones(9)], axis=1)
    for points in (line, flat, line[:2]):
        assert density(points) is None

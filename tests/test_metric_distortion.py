"""Distortion in a metric: roots, dense tangent spaces, nulls that are exact, classes with planted changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.geometry.distortion import attention_distortion, cache, distortion, distortions, quick
from geoquant.geometry.metric import judged_distortion, metric_root, outlier_rows, output_energy
from geoquant.geometry.nulls import matched_noise
from test_tangent import generator


def inputs(dimension=24, tokens=400, seed=0, decades=1.5):
    """Second moments of inputs whose directions differ widely."""
    mixing = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator(seed))).Q
    x = torch.randn(tokens, dimension, generator=generator(seed + 1)) * torch.logspace(0, -decades, dimension)
    return (x @ mixing).T @ (x @ mixing) / tokens


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 40))
def test_a_root_gives_the_lengths_of_the_metric_whatever_its_rank(seed, tokens):
    x = torch.randn(tokens, 12, generator=generator(seed), dtype=torch.float64)
    metric, points = x.T @ x, torch.randn(5, 12, generator=generator(seed + 1), dtype=torch.float64)
    lengths = (points @ metric_root(metric)).square().sum(1)
    torch.testing.assert_close(lengths, (points @ x.T).square().sum(1), rtol=1e-8, atol=1e-9)


def test_what_is_no_metric_is_refused():
    with pytest.raises(ValueError, match="no negative eigenvalue, but got -1"):
        metric_root(torch.diag(torch.tensor([2.0, -1.0])))


def test_metric_distortion_is_that_of_dense_projections_in_the_metric():
    """The definition, row by row, in the metric's own inner product: no root, no Gram trick."""
    metric = inputs().double()
    weight, changes = (torch.randn(50, 24, generator=generator(seed), dtype=torch.float64) for seed in (2, 3))
    k, share = 9, 0.9
    found = judged_distortion(weight, weight + changes, generator(4), metric, k=k, share=share, draws=1).found
    for row in range(50):
        gaps = weight - weight[row]
        lengths = ((gaps @ metric) * gaps).sum(1)
        lengths[row] = torch.inf
        near = weight[lengths.argsort()[:k]]
        centre = near.mean(0)
        # Principal directions in the metric solve C A u = lambda u with u^T A u = 1.
        values, vectors = torch.linalg.eig((near - centre).T @ (near - centre) @ metric)
        order = values.real.argsort(descending=True)
        values, vectors = values.real[order], vectors.real[:, order]
        dims = int((values.cumsum(0) / values.sum() < share).sum()) + 1
        basis = vectors[:, :dims] / ((vectors[:, :dims].T @ metric) * vectors[:, :dims].T).sum(1).sqrt()

        def normal(vector, basis=basis):
            rest = vector - basis @ (basis.T @ metric @ vector)
            return (rest @ metric @ rest).sqrt()

        assert found.dims[row] == dims
        assert found.md[row].item() == pytest.approx((normal(changes[row]) / normal(weight[row] - centre)).item(), 1e-6)


def test_an_isotropic_metric_changes_nothing():
    weight, changes = (torch.randn(80, 16, generator=generator(seed)) for seed in (5, 6))
    plain = judged_distortion(weight, weight + changes, generator(7), k=10)
    scaled = judged_distortion(weight, weight + changes, generator(7), 9 * torch.eye(16), k=10)
    torch.testing.assert_close(scaled.found.md, plain.found.md, rtol=1e-4, atol=0)
    assert scaled.whole.ratio == pytest.approx(plain.whole.ratio, rel=1e-4)
    torch.testing.assert_close(plain.found.md, distortion(weight, changes, k=10).md, rtol=1e-4, atol=0)


def test_several_changes_at_once_are_each_alone():
    weight, *changes = (torch.randn(60, 16, generator=generator(seed)) for seed in range(8, 11))
    for change, found in zip(changes, distortions(weight, changes, k=10), strict=True):
        alone = distortion(weight, change, k=10)
        torch.testing.assert_close(found.md, alone.md)
        torch.testing.assert_close(found.share, alone.share)


def test_noise_is_its_own_null():
    """A change that is isotropic noise has ratio one: of 40 seeds |log ratio| exceeds three errors in fewer than 5.

    Rows share neighbours but not noise, so the error is that of independent rows; by the normal law 0.1 are expected.
    The null's own draws add a third of the variance, each shared by one row only, which the spread of rows contains.
    """
    weight, metric = torch.randn(150, 24, generator=generator(11)), inputs()
    far = 0
    for seed in range(40):
        noise = 0.1 * torch.randn(150, 24, generator=generator(100 + seed))
        found = judged_distortion(weight, weight + noise, generator(seed), metric, k=12).whole
        far += abs(torch.tensor(found.ratio).log().item()) > 3 * found.error
    assert far < 5


def test_a_change_that_avoids_the_inputs_is_seen_in_the_metric_only():
    weight, metric = torch.randn(150, 24, generator=generator(12)), inputs()
    loud = torch.linalg.eigh(metric).eigenvectors[:, -8:]
    quiet = torch.randn(150, 24, generator=generator(13))
    quiet -= quiet @ loud @ loud.T
    plain = judged_distortion(weight, weight + quiet, generator(14), k=12).whole
    inside = judged_distortion(weight, weight + quiet, generator(14), metric, k=12).whole
    assert plain.ratio == pytest.approx(1, abs=0.1)
    assert inside.ratio < 0.7
    # What noise has in the loud directions is mostly tangent; what is left of the change is not.
    assert inside.share > inside.null_share + 0.2
    assert inside.rows == 150


def test_classes_have_the_changes_that_were_planted():
    weight = torch.randn(120, 20, generator=generator(15))
    changes = 0.1 * matched_noise(torch.ones(120, 20), generator(16))
    large = torch.arange(0, 120, 4)
    changes[large] *= 3
    changes[5] = 0
    rest = torch.tensor([row for row in range(120) if row % 4])
    found = judged_distortion(weight, weight + changes, generator(17), classes={"large": large, "rest": rest}, k=12)
    assert found.classes["large"].md / found.classes["rest"].md == pytest.approx(3, rel=0.15)
    assert found.classes["large"].ratio == pytest.approx(1, abs=0.1)  # the null is as long: length alone is no finding
    assert found.classes["rest"].rows == 89  # row 5 did not change
    some = judged_distortion(
        weight, weight + changes, generator(17), classes={"large": large, "none": rest[:0]}, rows=large[:10], k=12
    )
    assert some.classes["large"].rows == 10
    assert some.classes["none"].rows == 0
    torch.testing.assert_close(some.found.md, found.found.md[large[:10]])


def test_outlier_rows_are_those_with_a_large_weight():
    weight = torch.randn(100, 64, generator=generator(18))
    weight[[7, 31, 60, 88, 93], 5] += 20
    assert outlier_rows(weight).tolist() == [7, 31, 60, 88, 93]
    assert outlier_rows(1000 * weight, share=0.001).numel() == 1
    assert outlier_rows(torch.ones(4, 8), 0.5).numel() == 2


def test_the_quick_check_works_in_a_metric():
    weight, changes = (torch.randn(100, 24, generator=generator(seed)) for seed in (19, 20))
    root, rows = metric_root(inputs()), torch.tensor([3, 50, 9])
    known = cache(weight @ root, rows, k=12)
    whole = distortion(weight @ root, changes @ root, k=12, rows=rows)
    torch.testing.assert_close(quick(known, changes[rows] @ root), whole.md, rtol=5e-3, atol=0)


def test_attention_is_weighted_by_the_energy_of_outputs():
    """Both sides together have the root mean square of all rows, when each side's is weighted by its rows' energy."""
    x = torch.randn(300, 24, generator=generator(21))
    weight = torch.randn(10, 24, generator=generator(22))
    energy = output_energy(weight, x.T @ x)
    assert energy == pytest.approx((x @ weight.T).square().sum().item(), rel=1e-4)
    assert attention_distortion(0.2, 0.2, energy, 3 * energy) == pytest.approx(0.2)

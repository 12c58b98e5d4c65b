"""Manifold distortion on surfaces with a closed form, against its null, and its quick twin."""

from __future__ import annotations

import pytest
import torch

from geoquant.geometry.distortion import attention_distortion, cache, distortion, expert_distortion, quick
from geoquant.geometry.nulls import matched_noise
from geoquant.geometry.tangent import neighbours
from test_tangent import embedded, generator, sphere


def test_a_step_off_a_sphere_in_units_of_its_sagitta():
    """Neighbours of a point fill a cap of radius rho evenly; their mean lies rho^2 / 4R below the point."""
    radius, step = 2.0, 0.01
    inner = sphere(20000, 2, radius)
    points, basis = embedded(inner, 10)
    outward = step * inner @ basis.T / radius
    rows = torch.arange(0, 20000, 97)
    found = distortion(points, outward, k=40, rows=rows)
    reach = (points[neighbours(points, 40, rows)] - points[rows, None]).norm(dim=2)[:, -1]
    expected = step / (reach.square() / (4 * radius))
    assert found.md.median() == pytest.approx(expected.median().item(), rel=0.1)
    assert (found.share > 0.98).all()
    along = torch.randn(20000, 3, generator=generator(1))
    along -= inner * (along * inner).sum(1, keepdim=True) / radius**2
    assert (distortion(points, along @ basis.T, k=40, rows=rows).share < 0.2).all()


def test_on_a_plane_nothing_can_be_measured_by_its_own_distance():
    points, basis = embedded(torch.rand(200, 3, generator=generator(2)), 8)
    found = distortion(points, torch.randn(200, 8, generator=generator(3)), k=12, share=1.0)
    assert found.md.isinf().all()
    inside = torch.randn(200, 3, generator=generator(4)) @ basis.T
    assert (distortion(points, inside, k=12, share=1.0).share < 0.01).all()


@pytest.mark.parametrize("dimension", [60, 300])
def test_noise_knows_no_tangent_space(dimension):
    """The normal share of a random direction is sqrt(1 - d / D), whatever the cloud."""
    points = torch.randn(300, dimension, generator=generator(5)) @ torch.diag(torch.linspace(0.2, 2, dimension))
    found = distortion(points, torch.randn(300, dimension, generator=generator(6)))
    expected = (1 - found.dims / dimension).sqrt()
    assert (found.share - expected).mean().abs() < 0.005


def test_length_and_unit():
    points, changes = (torch.randn(80, 20, generator=generator(seed)) for seed in (7, 8))
    plain = distortion(points, changes, k=10)
    longer, other = distortion(points, 3 * changes, k=10), distortion(50 * points + 1, 50 * changes, k=10)
    torch.testing.assert_close(longer.md, 3 * plain.md)
    torch.testing.assert_close(longer.share, plain.share)
    torch.testing.assert_close(other.md, plain.md, rtol=1e-3, atol=0)
    some = distortion(points, changes, k=10, rows=torch.tensor([5, 40]))
    torch.testing.assert_close(some.md, plain.md[[5, 40]])
    assert distortion(points, torch.zeros_like(points), k=10).share.isnan().all()


def test_noise_of_the_same_length():
    changes = torch.randn(50, 30, generator=generator(9)) * torch.rand(50, 1, generator=generator(10))
    noise = matched_noise(changes, generator(11))
    torch.testing.assert_close(noise.norm(dim=1), changes.norm(dim=1))
    assert (torch.cosine_similarity(noise, changes).abs() < 0.7).all()


def test_the_quick_check_says_the_same():
    points, changes = (torch.randn(200, 64, generator=generator(seed)) for seed in (12, 13))
    rows = torch.tensor([9, 3, 150, 77])
    known = cache(points, rows, k=16)
    assert known.bases.dtype == torch.float16
    whole = distortion(points, changes, k=16, rows=rows)
    torch.testing.assert_close(quick(known, changes[rows]), whole.md, rtol=2e-3, atol=0)


def test_several_matrices_as_one_number():
    assert attention_distortion(0.3, 0.4, 1.0, 1.0) == pytest.approx((0.125) ** 0.5)
    assert attention_distortion(0.3, 0.4, 1.0, 0.0) == pytest.approx(0.3)
    assert attention_distortion(0.3, 0.4, 0.0, 0.0) == 0
    assert expert_distortion([0.1, 0.5], [3, 1]) == pytest.approx(0.2)
    for frequencies in ([1.0], [1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(ValueError, match="one frequency per expert"):
            expert_distortion([0.1, 0.5], frequencies)

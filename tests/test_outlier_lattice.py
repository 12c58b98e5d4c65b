"""Scores of the lattice, of the inputs' subspace and of distortion, against their definitions done the long way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geoquant.outliers.scores import SCORES
from geoquant.outliers.scores.distortion import median_distortion
from geoquant.outliers.scores.lattice import lattice_defect, lattice_eta
from geoquant.outliers.scores.outside import input_dimension, outside
from outlier_toy import IN, toy


def with_metric(metric: torch.Tensor, **changes):
    """The toy's site with these second moments of its public inputs."""
    context = toy().context
    return replace(context, public=replace(context.public, hessian=metric * context.public.tokens), **changes)


def test_defect_and_eta_are_those_of_gram_schmidt_done_by_hand():
    context = toy().context
    metric = (context.public.hessian / context.public.tokens).double().numpy()
    metric += 0.01 * np.diag(metric).mean() * np.eye(IN)
    basis = np.linalg.cholesky(metric).T  # columns are basis vectors of these scalar products
    lengths, own, done = [], [], []
    for column in basis.T:
        rest = column - sum(((column @ other) / (other @ other)) * other for other in done)
        lengths.append(np.linalg.norm(column))
        own.append(np.linalg.norm(rest))
        done.append(rest)
    assert lattice_defect(context).item() == pytest.approx(np.log(np.array(lengths) / own).mean(), rel=1e-4)
    assert lattice_eta(context).item() == pytest.approx(np.mean(own), rel=1e-4)


def test_defect_knows_no_unit_and_no_order_and_eta_knows_both():
    metric = toy().context.public.hessian / toy().context.public.tokens
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    one, scaled, turned = (with_metric(m) for m in (metric, 9 * metric, metric[order][:, order]))
    assert lattice_defect(scaled).item() == pytest.approx(lattice_defect(one).item(), rel=1e-5)
    assert lattice_defect(turned).item() == pytest.approx(lattice_defect(one).item(), rel=1e-5)
    assert lattice_eta(scaled).item() == pytest.approx(3 * lattice_eta(one).item(), rel=1e-5)
    assert abs(lattice_eta(turned).item() / lattice_eta(one).item() - 1) > 1e-4
    assert lattice_defect(with_metric(torch.eye(IN))).item() == pytest.approx(0, abs=1e-6)


def test_outside_is_the_share_of_squares_off_a_known_subspace():
    values = torch.cat([torch.full((5,), 10.0), torch.full((IN - 5,), 0.05)])  # five dimensions hold 98.5%
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(2)))[0]
    metric = basis @ torch.diag(values) @ basis.T
    within, without = basis[:, :5], basis[:, 5:]
    delta = 3 * torch.outer(torch.randn(12, generator=torch.Generator().manual_seed(3)), within[:, 0])
    assert outside(with_metric(metric, delta=delta)).item() == pytest.approx(0, abs=1e-5)
    mixed = torch.outer(torch.ones(12), 3 * within[:, 1] + without[:, 4])
    assert outside(with_metric(metric, delta=mixed)).item() == pytest.approx(0.1, abs=1e-5)
    assert input_dimension(with_metric(metric)).item() == pytest.approx(-5 / IN)
    assert outside(with_metric(metric, delta=torch.zeros(12, IN))).item() == 0


def test_a_random_error_lies_outside_by_the_share_of_dimensions():
    """Of 2000 rows of noise the share outside k of n dimensions is 1 - k / n, within 3% here."""
    context = with_metric(torch.diag(torch.cat([torch.ones(8), torch.full((IN - 8,), 1e-6)])))
    noise = torch.randn(2000, IN, generator=torch.Generator().manual_seed(4))
    assert outside(replace(context, delta=noise)).item() == pytest.approx(1 - 8 / IN, rel=0.03)


def test_distortion_is_the_normal_part_over_the_distance_from_the_tangent_plane():
    """Rows on a plane of two dimensions, one lifted off it by 1/2: an error of length h along the normal has MD 2 h."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(40, IN)
    weight[:, :2] = torch.randn(40, 2, generator=generator)
    weight[:, 2] = 0.5 * torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0) * 1e-3
    delta = torch.zeros(40, IN)
    delta[:, 3] = 0.25e-3
    context = replace(toy().context, weight=weight, delta=delta)
    found = median_distortion(context).item()
    # Neighbours lie on both sides, so that their mean is near the plane and n about the row's own height.
    assert found == pytest.approx(0.5, rel=0.15)
    assert median_distortion(replace(context, delta=3 * delta)).item() == pytest.approx(3 * found, rel=1e-4)


def test_they_are_on_the_board():
    assert {"lattice_defect", "lattice_eta", "outside", "input_dimension", "distortion"} <= set(SCORES)

"""The certificate against its definitions, written out in loops and in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.certificate import certificate, error_energies, squared_steps

NONE = torch.zeros(0, dtype=torch.int64)


def metric(columns: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


def plane_by_plane(weight: torch.Tensor, a: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unboxed nearest plane, columns in natural order, and its lengths: each choice by a fresh least-squares solve.

    Once columns 0..j are fixed, the free ones take the values that minimise the error: no factor, no recursion.
    """
    columns = weight.shape[1]
    result = torch.zeros_like(weight)
    lengths = torch.zeros(columns, dtype=a.dtype)
    for j in range(columns):
        free = slice(j, columns)
        later = a[j + 1 :, j + 1 :]
        cross = a[j, j + 1 :]
        lengths[j] = (a[j, j] - (cross @ torch.linalg.solve(later, cross) if j + 1 < columns else 0.0)).sqrt()
        fixed = (weight - result)[:, :j]
        ideal = weight[:, free] + fixed @ a[:j, free] @ torch.linalg.inv(a[free, free])
        result[:, j] = (ideal[:, 0] / steps[:, j]).round() * steps[:, j]
    return result, lengths


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_energy_is_the_quadratic_form_row_by_row(rows, columns, seed):
    difference, a = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), metric(columns, seed)
    total = sum(
        float(difference[r, i]) * float(a[i, j]) * float(difference[r, j])
        for r in range(rows)
        for i in range(columns)
        for j in range(columns)
    )
    found = error_energies(difference.double(), a, 3 * a)
    assert found == pytest.approx([total, 3 * total], rel=1e-10, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(2, 12),
    group=st.integers(1, 13),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_squared_steps_are_the_double_sum(rows, columns, group, data, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = data.draw(st.lists(st.integers(0, columns - 1), unique=True, max_size=columns - 1))
    scales = torch.randn(rows, -(-columns // group), generator=generator)
    lengths = torch.rand(columns, generator=generator)
    total = sum(
        float(scales[r, j // group]) ** 2 * float(lengths[j]) ** 2
        for r in range(rows)
        for j in range(columns)
        if j not in kept
    )
    index = torch.tensor(sorted(kept), dtype=torch.int64)
    assert squared_steps(scales, lengths, index, group).planes == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_row_of_the_nearest_plane_exceeds_the_bound_and_the_mean_is_the_expectation(seed):
    generator = torch.Generator().manual_seed(seed)
    columns, group, a = 12, 5, metric(12, seed)
    weight = torch.randn(4000, columns, generator=generator, dtype=torch.float64)
    scales = (0.02 + 0.05 * torch.rand(3, generator=generator, dtype=torch.float64)).expand(4000, 3)
    steps = scales.repeat_interleave(group, dim=1)[:, :columns]
    quantized, lengths = plane_by_plane(weight, a, steps)
    found = certificate(weight, quantized, a, None, squared_steps(scales, lengths, NONE, group), 0.0)
    energy = error_energies(weight, a)[0]
    rows = torch.einsum("ri,ij,rj->r", quantized - weight, a, quantized - weight)
    assert rows.max() <= found.bound * energy / 4000 * (1 + 1e-9)
    assert found.error == pytest.approx(rows.sum().item() / energy)
    # 4000 rows with errors all over their cells: the mean is known to about one per cent.
    assert found.error == pytest.approx(found.expected_error, rel=0.03)
    assert found.bound == pytest.approx(3 * found.expected_error)


def test_errors_are_relative_and_units_of_the_metric_do_not_matter():
    a, weight = metric(6, 1), torch.randn(3, 6, dtype=torch.float64)
    quantized, scales, lengths = weight + 0.1, torch.full((3, 2), 0.5), torch.rand(6)
    one = certificate(weight, quantized, a, a, squared_steps(scales, lengths, NONE, 3), 0.25)
    other = certificate(weight, quantized, 4 * a, 7 * a, squared_steps(scales, 2 * lengths, NONE, 3), 0.25)
    for name in ("error", "heldout_error", "expected_error", "bound", "sphere_bound", "gap_db", "headroom_db"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)
    assert one.error == pytest.approx(one.heldout_error)
    assert one.clip_rate == 0.25


def test_the_sign_of_a_step_does_not_matter():
    scales, lengths = torch.tensor([[0.5, -0.25]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert squared_steps(scales, lengths, NONE, 2).planes == 0.25 * 5 + 0.0625 * 25


def test_a_site_that_no_input_reaches_has_finite_numbers():
    nothing = torch.zeros(4, 4)
    found = certificate(
        torch.randn(2, 4),
        torch.zeros(2, 4),
        nothing,
        nothing,
        squared_steps(torch.ones(2, 1), torch.zeros(4), NONE, 4),
        0,
    )
    assert all(math.isfinite(value) for value in (found.error, found.heldout_error, found.expected_error, found.bound))
    assert found.error == 0

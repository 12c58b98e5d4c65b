"""Leading eigenpairs and traces of operators against dense linear algebra, awkward spectra among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.geometry.lanczos import stochastic_trace, top_eigenpairs
from geoquant.geometry.spectrum import principal_angles

SIZE = 150
SPECTRA = {
    "spread": torch.linspace(0, 1, SIZE),
    "steep": torch.logspace(0, -12, SIZE),
    "one giant": torch.cat([torch.tensor([1e4]), torch.linspace(0.5, 1, SIZE - 1)]),
    "clustered": torch.cat([1 + 1e-5 * torch.arange(6), torch.linspace(0, 0.5, SIZE - 6)]),
    "repeated": torch.cat([torch.full((4,), 3.0), torch.full((4,), 2.0), torch.linspace(0, 1, SIZE - 8)]),
    "all equal": torch.ones(SIZE),
    "projection": torch.cat([torch.ones(6), torch.zeros(SIZE - 6)]),
}


def matrix(values, seed=0):
    random = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(random).Q
    return vectors * values.double() @ vectors.T


@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalues_are_those_of_the_matrix(name):
    a = matrix(SPECTRA[name])
    calls = []
    found = top_eigenpairs(lambda v: calls.append(v) or a @ v, SIZE, 6)
    values = torch.linalg.eigvalsh(a).flip(0)[:6]
    torch.testing.assert_close(found.values, values, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(6).double(), rtol=0, atol=1e-8)
    lengths = (a @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, lengths / found.values, rtol=1e-3, atol=1e-14)
    assert found.converged
    assert found.residuals.max() <= 1e-4
    assert found.products == len(calls)
    assert values[0] * (1 - 1e-6) <= found.at_least <= values[0] * (1 + 1e-12)


def test_copies_of_an_eigenvalue_that_one_search_misses_are_found_by_the_next():
    a = matrix(SPECTRA["repeated"])
    exact = torch.linalg.eigh(a).eigenvectors[:, -8:]
    once, twice = (top_eigenpairs(lambda v: a @ v, SIZE, 8, again=again) for again in (False, True))
    assert once.values[-1] == pytest.approx(1)  # the fourth 2 is missing, with a small residual throughout
    torch.testing.assert_close(twice.values, torch.tensor([3.0] * 4 + [2.0] * 4).double(), rtol=1e-8, atol=0)
    assert principal_angles(twice.vectors, exact).max() < 1e-3
    assert twice.converged


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_the_unit_of_the_operator_does_not_matter(unit):
    a = matrix(SPECTRA["spread"])
    found, plain = (top_eigenpairs(lambda v, u=u: u * (a @ v), SIZE, 4) for u in (unit, 1.0))
    torch.testing.assert_close(found.values, unit * plain.values, rtol=1e-9, atol=0)
    assert found.converged


@given(n=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_size_and_number(n, share, seed):
    """Small spaces are solved densely, larger ones are not; nobody sees the border."""
    k = max(1, round(share * n))
    a = matrix(torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1, seed)
    found = top_eigenpairs(lambda v: a @ v, n, k)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(a).flip(0)[:k], rtol=1e-6, atol=0)
    assert found.converged
    assert found.wanted == k


def test_single_precision_is_held_to_what_it_can_know():
    a = matrix(SPECTRA["one giant"])
    found = top_eigenpairs(lambda v: a.float() @ v, SIZE, 3, dtype=torch.float32)
    torch.testing.assert_close(found.values.double(), torch.linalg.eigvalsh(a).flip(0)[:3], rtol=1e-3, atol=0)
    assert found.vectors.dtype == torch.float32
    assert found.converged


def test_too_few_products_are_no_error_and_no_answer():
    a = matrix(SPECTRA["spread"])
    found = top_eigenpairs(lambda v: a @ v, SIZE, 6, tolerance=1e-8, limit=30)
    assert not found.converged
    assert len(found.values) < found.wanted == 6
    assert found.products <= 30 + 20
    assert 0.5 < found.at_least <= 1 + 1e-12


def test_residuals_are_measured_and_not_believed():
    """An operator that is not the same twice has no eigenpairs, whatever the method says."""
    a = matrix(SPECTRA["steep"])
    generator = torch.Generator().manual_seed(1)

    def noisy(v):
        return a @ v + 1e-3 * torch.randn(SIZE, generator=generator, dtype=torch.float64)

    found = top_eigenpairs(noisy, SIZE, 2)
    assert not found.converged


def test_operators_without_eigenpairs():
    found = top_eigenpairs(lambda v: 0 * v, SIZE, 2)
    assert (found.converged, found.at_least) == (False, 0.0)
    for size in (SIZE, 5):
        found = top_eigenpairs(lambda v: v * float("nan"), size, 2)
        assert len(found.values) == 0
        assert not found.converged
        assert found.at_least != found.at_least
        assert found.products == 1
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"size 5 has 5 eigenpairs, not {k}"):
            top_eigenpairs(lambda v: v, 5, k)


def test_the_trace_of_a_diagonal_matrix_needs_one_probe():
    d = torch.rand(50, dtype=torch.float64)
    found = stochastic_trace(lambda v: d * v, 50, 3, torch.Generator().manual_seed(0))
    assert found.value == pytest.approx(d.sum().item(), rel=1e-12)
    assert found.se < 1e-12
    assert found.products == 3


def test_the_trace_is_unbiased_and_its_error_is_the_stated_one():
    a = matrix(SPECTRA["spread"])
    trace = a.trace().item()
    deviation = (2 * (a.square().sum() - a.diagonal().square().sum())).sqrt().item()
    generator = torch.Generator().manual_seed(0)
    found = [stochastic_trace(lambda v: a @ v, SIZE, 20, generator) for _ in range(200)]
    values = torch.tensor([one.value for one in found])
    # 4000 probes: the mean is off by more than 3.5 of its standard errors with probability below 5e-4.
    assert abs(values.mean().item() - trace) < 3.5 * deviation / 4000**0.5
    assert sum(one.se for one in found) / 200 == pytest.approx(deviation / 20**0.5, rel=0.08)
    inside = sum(abs(one.value - trace) < 2.09 * one.se for one in found)  # t with 19 degrees of freedom: 95%
    assert 178 <= inside <= 199  # binomial: left with probability below 1e-3 each side


def test_one_probe_has_no_standard_error():
    found = stochastic_trace(lambda v: v, 4, 1, torch.Generator())
    assert found.value == 4
    assert found.se != found.se


def test_a_rest_that_was_not_searched_to_the_end_is_not_passed_over():
    """The giant is found at once; whether anything like it is left is not known within the limit."""
    a = matrix(SPECTRA["one giant"])
    once, twice = (
        top_eigenpairs(lambda v: a @ v, SIZE, 1, tolerance=1e-10, limit=25, again=again) for again in (False, True)
    )
    assert once.converged
    assert twice.residuals[0] < 1e-10
    assert not twice.converged

"""A price on bits in closed form, against enumeration, the variance of real codes, and the bits that a coder takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from geoquant.lattice.basis import damped, error_spread, metric_factor
from geoquant.lattice.beside import Pulls
from geoquant.lattice.order import column_order
from geoquant.lattice.priced import FINE, pulls_of, variances
from geoquant.lattice.rate import code_bits, spread_of
from geoquant.lattice.rows import single_rows
from geoquant.lattice.unboxed import exponents, steps_of, unboxed_babai
from geoquant.methods import lattice, priced
from geoquant.methods.problem import Problem
from oracles.lattice import column_error, priced_codes, random_metric
from test_experiments import basis_of, coupled, on_the_lattice, posed


@pytest.mark.parametrize("kind", ["no rows", "strangers", "blocks"])
def test_without_a_price_it_is_babai(kind):
    _metric, order, factor, steps, weight = posed(70, 10, 7)
    rows = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)
    known = {"no rows": None, "strangers": single_rows(rows), "blocks": coupled(10, 7)[0]}[kind]
    if known is not None:
        known = type(known)(known.factor.double(), known.sizes)
    given = (weight, basis_of(factor), order, rows, steps, known)
    ones = torch.ones_like(rows), torch.ones_like(steps)
    assert torch.equal(unboxed_babai(*given, pulls_of(ones, ones, 0.0)), unboxed_babai(*given))
    assert not torch.equal(unboxed_babai(*given, pulls_of(ones, ones, 1.0)), unboxed_babai(*given))


def test_many_rows_are_priced_in_parts(monkeypatch):
    _, order, factor, steps, weight = posed(12, 9, 2)
    rows = torch.ones(9, dtype=torch.float64)
    given = (weight, basis_of(factor), order, rows, steps, single_rows(rows), Pulls(torch.arange(9.0), 0.1 * steps))
    whole = unboxed_babai(*given)
    monkeypatch.setattr("geoquant.lattice.unboxed.ROWS", 4)
    assert torch.equal(unboxed_babai(*given), whole)
    one = variances(weight, rows, steps, rows, steps)
    monkeypatch.setattr("geoquant.lattice.priced.ROWS", 4)
    torch.testing.assert_close(variances(weight, rows, steps, rows, steps), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_minimises_error_and_price_of_gaussian_bits(dtype):
    """One column: of all codes that are no further than a step from the nearest, the best of its own Gaussian."""
    generator = torch.Generator().manual_seed(0)
    weight = 4 * torch.randn(500, 1, generator=generator, dtype=dtype)
    variance, cost = (torch.rand(2, 500, generator=generator, dtype=dtype) + torch.tensor([[0.1], [0.8]])).to(dtype)
    one, order = torch.ones(1, 1, dtype=dtype), torch.tensor([0])
    pulls = pulls_of((variance, one[0]), (cost, one[0]), 0.3)
    found = unboxed_babai(weight, one, order, torch.ones(500, dtype=dtype), one[0], None, pulls)[:, 0].to(dtype)

    def total(codes):
        bits = codes.square() / (2 * variance[:, None] * math.log(2))
        return cost[:, None] * (weight - codes).square() + 0.3 * bits

    best = total(torch.arange(-20.0, 21.0, dtype=dtype).expand(500, -1)).min(1).values
    drawn = weight[:, 0] / (1 + pulls.rows * pulls.columns)
    near = (weight[:, 0] - drawn).abs() <= 1
    assert 300 < near.sum() < 500
    torch.testing.assert_close(total(found[:, None])[near, 0], best[near])
    far = ~near
    assert torch.equal(found[far], (weight[far, 0] - weight[far, 0].sign()).round())


def test_a_variance_is_that_of_the_codes():
    """Of Babai's own codes, where rows and columns are coupled and of unlike sizes, within a tenth in the mean."""
    columns, rows = 120, 64 * 6
    generator = torch.Generator().manual_seed(5)
    metric = random_metric(columns, 5).float()
    order = column_order("activation", metric, columns)
    basis = metric_factor(metric, order, 0.01)
    steps = torch.empty(columns)
    steps[order] = basis.diagonal().reciprocal()
    steps, row_steps = steps_of(exponents(steps)), steps_of(exponents(0.4 + torch.rand(rows, generator=generator)))
    known, _ = coupled(rows, 3)
    sizes = torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator) + 0.1
    weight = 3 * sizes * steps * torch.randn(rows, columns, generator=generator)
    codes = unboxed_babai(weight, basis, order, row_steps, steps, known).float()
    sides = steps * torch.empty(columns).index_copy_(0, order, basis.diagonal())
    errors = known.error_squares(row_steps)[0] / row_steps.square()
    found = variances(weight, row_steps, steps, errors, error_spread(basis, order, sides, 4096) / steps.square())
    expected = found[0][:, None] * found[1]
    for axis in (0, 1):
        ratio = codes.square().mean(axis) / expected.mean(axis)
        assert ratio.log().mean().exp() == pytest.approx(1, abs=0.1)
        assert ratio.log().std() < 0.3
    alone = weight.square() / (row_steps[:, None] * steps).square()
    assert codes.square().mean() > 1.05 * alone.mean()  # errors are a part of it


@pytest.mark.parametrize("seed", range(4))
def test_the_default_method_does_what_its_formulas_say(seed, monkeypatch):
    """Every code of a whole solve, where rows and columns are unlike, lengths have a price, and a row is so small
    that its step is not the one of the others; columns that share steps with two others, or with none."""
    monkeypatch.setattr("geoquant.lattice.priced.ROUNDS", 60)
    exact = lambda basis, order, sides: (  # noqa: E731
        (sides[order].square() @ torch.linalg.inv(basis).square())[order.argsort()]
    )
    monkeypatch.setattr("geoquant.methods.priced.error_spread", exact)
    known, outputs = coupled(8, seed)
    metric, generator = random_metric(19, seed), torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 19, generator=generator) / metric.diagonal().sqrt().float()
    weight[2] *= 0.005
    heldout = 10 * metric  # no news, so what damping makes lengths too long by is taken back
    given = Problem(weight, 90 * metric, heldout, order="activation", damping=0.3, tokens=100, step=0.5, rows=known)
    given = replace(given, ties=torch.arange(19) // 3 if seed % 2 else None)
    found = priced.solve(given)
    order = column_order("activation", given.pooled, 19)
    price = lattice.choose_damping(given, order)[1]
    assert price < 0.8
    assert steps_of(found.row_exponents)[2] < 0.8 * 0.5 / known.lengths[2]
    steps = (steps_of(x).double() for x in (found.row_exponents, found.column_exponents))
    inputs = damped(given.pooled / 100, 0.3)
    expected = priced_codes(weight.double(), inputs, outputs, order, *steps, 0.5, price, priced.PRICE)
    assert torch.equal(found.codes.double(), expected)
    assert not torch.equal(found.codes, lattice.solve(given).codes)


def test_what_babai_leaves_in_each_weight():
    """Columns of one step each, and groups that share one: the closed form, from random vectors."""
    metric = random_metric(60, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    basis = metric_factor(metric, order, 0.0, torch.float64)
    handed = torch.linalg.inv(basis).square()  # of U, in the order of the basis
    lengths = torch.empty_like(metric[0]).index_copy_(0, order, basis.diagonal())
    for steps in (1 / lengths, torch.linspace(1, 3, 60, dtype=torch.float64)):
        sides = lengths * steps
        exact = torch.empty_like(sides).index_copy_(0, order, sides[order].square() @ handed)
        errors = error_spread(basis, order, sides, 32) / exact - 1
        assert errors.std() == pytest.approx((2 / 32) ** 0.5, rel=0.4)
        torch.testing.assert_close(error_spread(basis, order, sides, 20000), exact, rtol=0.1, atol=0)
        weight = 50 * torch.randn(4000, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        codes = unboxed_babai(weight, basis, order, torch.ones(4000, dtype=torch.float64), steps)
        left = 12 * (weight - codes * steps).square().mean(0)
        torch.testing.assert_close(left, exact, rtol=0.12, atol=0)
    alike = torch.linalg.inv(metric).diagonal()
    torch.testing.assert_close(error_spread(basis, order, torch.ones_like(alike), 20000), alike, rtol=0.1, atol=0)


def test_a_price_buys_error_back_at_equal_bits():
    """Gaussian weights at less than two bits: at least a twentieth of the error."""
    columns, rows = 64, 600
    metric, order, factor, steps, weight = posed(columns, rows, 11)
    basis = basis_of(factor)

    def solved(coarse, mu):
        row_steps = torch.full((rows,), coarse, dtype=torch.float64)
        pulls = None
        if mu:
            sides = steps * torch.empty_like(steps).index_copy_(0, order, basis.diagonal())
            errors = torch.ones_like(row_steps), error_spread(basis, order, sides) / steps.square()
            cost = row_steps.square(), torch.ones_like(steps)
            pulls = pulls_of(variances(weight, row_steps, steps, *errors), cost, mu * coarse**2)
        codes = unboxed_babai(weight, basis, order, row_steps, steps, None, pulls)
        error = column_error(weight - coarse * codes * steps, metric).mean().item()
        return code_bits(codes, spread_of(codes)) / codes.numel(), error

    bits, error = solved(2.0, 0.0)
    curve = [solved(coarse, FINE) for coarse in (1.5, 1.65, 1.8, 2.0)]
    found = next(
        a[1] + (b[1] - a[1]) * (a[0] - bits) / (a[0] - b[0])
        for a, b in itertools.pairwise(curve)
        if a[0] >= bits >= b[0]
    )
    assert found < 0.95 * error, (bits, error, curve)


def test_no_code_is_further_from_its_centre_than_a_certificate_allows():
    """An outlier of a hundred standard deviations moves by one step, whatever the law of the others says."""
    given = on_the_lattice(rows=24, block=4)
    given.weight[3, 5] *= 100
    found, plain = priced.solve(given), lattice.solve(given)
    assert (found.codes - plain.codes).abs()[3, 5] <= 8  # a step of its own, and what its neighbours move it by
    assert torch.equal(found.row_errors[1], 9 * plain.row_errors[1])

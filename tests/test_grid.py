"""The step search against a dense list of steps; codes, steps and zero points stay storable whatever comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.grid import SCALE_DTYPE, Grid, dequantize, round_to_grid, search_scales
from oracles.lattice import dense_scale_error, grid_error

GRIDS = [Grid(bits, 64, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def sample(columns: int, rows: int, seed: int, *, heavy: bool = False):
    """Weights (columns, rows), heavy-tailed if asked, and log-normal importances."""
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(4.0).sample((columns, rows)) if heavy else torch.randn(columns, rows)
    return 0.05 * weight, torch.randn(columns).exp()


def rounding_allowance(weight, importance, scale, zero, grid):
    """What storing a step in bfloat16 (8 significant bits) can add: every point moves by at most 2^-8 of itself."""
    codes, _ = round_to_grid(weight, scale, zero, grid)
    point = (codes - (0 if zero is None else zero)) * scale
    return 2.0**-15 * (point.square() * importance[:, None]).sum(0)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(
    ("bits", "symmetric", "slack"),
    [(2, True, 1.04), (3, True, 1.02), (4, True, 1.03), (2, False, 1.2), (3, False, 1.1), (4, False, 1.08)],
)
def test_search_is_close_to_a_dense_search(bits, symmetric, slack, heavy):
    """Over 48 rows; an asymmetric search also has a zero point to find, and is given less time for it."""
    weight, importance = sample(64, 48, bits, heavy=heavy)
    grid = Grid(bits, 64, symmetric)
    found = grid_error(weight, importance, *search_scales(weight, importance, grid), grid)
    best = dense_scale_error(weight, importance, grid, tries=300 if symmetric else 40)
    assert found.sum() <= slack * best.sum()


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    columns=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    heavy=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    units=st.sampled_from([1e-30, 1.0, 1e25]),
)
def test_search_is_never_worse_than_min_max(grid, columns, seed, heavy, scale, units):
    """Both conventions of the min-max step, up to the storage precision, in any units of weights and metric."""
    weight, importance = sample(columns, 6, seed, heavy=heavy)
    weight, importance = weight * scale, importance * units
    step, zero = search_scales(weight, importance, grid)
    importance = importance / importance.max()
    found = grid_error(weight, importance, step, zero, grid)
    if grid.symmetric:
        largest = weight.abs().amax(0)
        rivals = [(largest / -grid.lowest, None), (largest / grid.highest, None)]
    else:
        low, high = weight.amin(0).clamp_max(0), weight.amax(0).clamp_min(0)
        rival = ((high - low) / grid.highest).to(SCALE_DTYPE).float()
        rivals = [(rival, (-low / rival).round().clamp(0, grid.highest))]
    for rival in rivals:
        slack = rounding_allowance(weight, importance, step, zero, grid) + 1e-5 * (
            weight.square() * importance[:, None]
        ).sum(0) * 2.0 ** (-grid.bits)
        assert (found <= grid_error(weight, importance, *rival, grid) + slack).all()


AWKWARD = {
    "zeros": torch.zeros(16, 3),
    "constant": torch.full((16, 3), 0.3),
    "negative constant": torch.full((16, 3), -0.3),
    "one huge weight": torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).index_fill(
        0, torch.tensor([4]), 1e30
    ),
    "denormals": torch.full((16, 3), 1e-40),
    "tiny": torch.full((16, 3), 1e-20),
    "one column": torch.tensor([[0.5, -0.25, 0.0]]),
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("importance", ["equal", "zero", "one", "tiny", "nan", "inf"])
def test_awkward_weights_get_a_usable_step(grid, name, importance):
    """Finite, not zero, exactly bfloat16; the codes fit their type; and the result is never worse than zeros."""
    weight = AWKWARD[name]
    value = {"equal": 1.0, "zero": 0.0, "one": 0.0, "tiny": 1e-42, "nan": 1.0, "inf": 1.0}[importance]
    weights = torch.full((len(weight),), value)
    if importance in ("one", "nan", "inf"):
        weights[0] = {"one": 1.0, "nan": torch.nan, "inf": torch.inf}[importance]
    scale, zero = search_scales(weight, weights, grid)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert torch.equal(scale.to(SCALE_DTYPE).float(), scale)
    codes, _ = round_to_grid(weight, scale, zero, grid)
    assert codes.isfinite().all()
    assert codes.min() >= grid.lowest
    assert codes.max() <= grid.highest
    assert torch.equal(codes.to(torch.int8 if grid.symmetric else torch.uint8).float(), codes)
    if zero is not None:
        assert torch.equal(zero.to(torch.uint8).float(), zero)
    counted = torch.ones_like(weights) if importance in ("nan", "inf", "zero", "tiny") else weights
    error = grid_error(weight.double(), counted.double(), scale.double(), None if zero is None else zero.double(), grid)
    assert (error <= (weight.double().square() * counted.double()[:, None]).sum(0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_inputs_fall_back_to_plain_squared_error(symmetric):
    """A group whose inputs never fire is rounded as if all counted the same, not thrown away."""
    weight, _ = sample(64, 32, 7)
    grid = Grid(4, 64, symmetric)
    dead, plain = (search_scales(weight, torch.full((64,), value), grid) for value in (0.0, 1.0))
    torch.testing.assert_close(dead[0], plain[0], rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_points_of_the_grid_are_found_again(symmetric):
    """Weights that already lie on a grid come back exactly."""
    torch.manual_seed(1)
    grid = Grid(4, 32, symmetric)
    codes = torch.randint(grid.lowest, grid.highest + 1, (32, 20)).float()
    codes[0], codes[1] = grid.lowest, grid.highest
    weight = (codes - (0 if symmetric else 7)) * 2.0**-5
    scale, zero = search_scales(weight, torch.ones(32), grid)
    assert grid_error(weight, torch.ones(32), scale, zero, grid).max() == 0


@settings(max_examples=40, deadline=None)
@given(grid=st.sampled_from(GRIDS), columns=st.integers(1, 40), group=st.integers(1, 50), seed=st.integers(0, 999))
def test_dequantize_is_scale_times_code_minus_zero(grid, columns, group, seed):
    """Element by element, with a last group of any length."""
    torch.manual_seed(seed)
    grid = Grid(grid.bits, group, grid.symmetric)
    codes = torch.randint(grid.lowest, grid.highest + 1, (3, columns))
    scales = torch.randn(3, grid.groups(columns)).to(SCALE_DTYPE)
    zeros = None if grid.symmetric else torch.randint(0, grid.highest + 1, scales.shape).to(torch.uint8)
    values = dequantize(codes.to(torch.int8 if grid.symmetric else torch.uint8), scales, zeros, group)
    for row in range(3):
        for column in range(columns):
            zero = 0 if zeros is None else int(zeros[row, column // group])
            expected = float(scales[row, column // group]) * (int(codes[row, column]) - zero)
            assert values[row, column].item() == expected


def test_grid_counts_its_bits():
    """Codes, one 16-bit step per group, and one zero point per group where asymmetric."""
    assert Grid(4, 64).bits_per_weight(128) == 4.25
    assert Grid(3, 64, symmetric=False).bits_per_weight(128) == 3 + 19 / 64
    assert Grid(4, 48).bits_per_weight(100) == 4 + 16 * 3 / 100


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [(1, 64, "bits must lie in 2..8, got 1"), (9, 64, "got 9"), (4, 0, "group_size must be at least 1, got 0")],
)
def test_impossible_grids_are_refused(bits, group, message):
    with pytest.raises(ValueError, match=message):
        Grid(bits, group)

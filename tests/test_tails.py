"""Tails against scipy, laws whose shares are known, exact Pareto samples; a stream against its tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.outliers.histogram import BINS, LARGEST, WIDTH, collect, edges
from geoquant.outliers.tails import hill, normal_tail, normal_tails, tails, tails_of
from test_tangent import generator


def student(df: float, n: int = 50_000, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(scipy.stats.t.rvs(df, size=n, random_state=seed)).float()


def test_numbers_of_a_sample_are_scipys_and_those_of_a_count():
    x = student(4) + 0.5
    values = x.double().numpy()
    found = tails(x)
    assert found.count == len(x)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(values), rel=1e-12)
    assert found.beyond_sigma == (np.abs(values - values.mean()) > 6 * values.std()).mean() > 0
    median = np.sort(np.abs(values))[(len(values) - 1) // 2]
    assert found.beyond_median == (np.abs(values) > 20 * median).mean()
    assert found.peak == pytest.approx(np.abs(values).max() / median, rel=1e-12)
    codes = np.round(values / (np.abs(values).max() / 127)).astype(int)
    assert found.effective_bits == pytest.approx(scipy.stats.entropy(np.unique(codes, return_counts=True)[1], base=2))


def test_shares_of_known_laws():
    """Laplace: exp(-6 sqrt 2) beyond six sigma. Cauchy: 2/pi atan(1/20) beyond 20 medians. Within 5 standard errors."""
    n = 1_000_000
    laplace = torch.empty(n).exponential_(generator=generator()) * (torch.randint(2, (n,), generator=generator()) - 0.5)
    for found, share in (
        (tails_of(collect(laplace)).beyond_sigma, math.exp(-6 * 2**0.5)),
        (tails_of(collect(student(1, n))).beyond_median, 2 / math.pi * math.atan(1 / 20)),
    ):
        assert found == pytest.approx(share, abs=5 * (share / n) ** 0.5)


def test_a_massive_activation_widens_what_counts_as_far():
    """One number of 3e4 among 600,000 normal ones has half of a variance of 2501: only it is beyond six deviations."""
    x = torch.randn(2000, 300, generator=generator())
    x[0, 0] = 3e4
    assert tails(x).beyond_sigma == 1 / x.numel()


def test_a_common_shift_moves_no_share_of_the_deviations():
    x = student(3)
    assert tails(x + 4000.0).beyond_sigma == pytest.approx(tails(x).beyond_sigma, rel=0.02)


def test_normal_tails_are_those_of_scipy():
    for deviations in (1.0, 3.0, 6.0):
        assert normal_tail(deviations) == pytest.approx(2 * scipy.stats.norm.sf(deviations), rel=1e-12)


def test_the_null_is_a_normal_law():
    n = 300_000
    found = normal_tails(n, generator())
    assert found.count == n
    assert abs(found.kurtosis) < 5 * (24 / n) ** 0.5
    assert found.beyond_sigma == found.beyond_median == 0
    # The largest of n, and the entropy of a grid with that reach: differential entropy less that of one step.
    assert found.largest == pytest.approx(scipy.stats.norm.isf(0.5 / n), abs=0.8)
    assert found.peak == pytest.approx(found.largest / scipy.stats.norm.isf(0.25), rel=0.01)
    assert found.effective_bits == pytest.approx(
        math.log2((2 * math.pi * math.e) ** 0.5 * 127 / found.largest), abs=0.01
    )


def test_bits_of_a_grid_that_is_used_evenly_and_of_one_that_is_not():
    assert tails(torch.arange(-127.0, 128)).effective_bits == pytest.approx(math.log2(255))
    massive = torch.cat([torch.randn(1000, generator=generator()), torch.tensor([1e5])])
    assert tails(massive).effective_bits < 0.02


def test_hills_index_is_right_within_its_standard_error():
    """200 samples of two power laws: outside 2 standard errors 4.6% (9 samples), more than 24 with probability 1e-5.
    A standard error half as large would leave 63."""
    for index in (1.5, 4.0):
        outside = 0
        for seed in range(200):
            values = np.sort(np.random.default_rng(seed).pareto(index, 400) + 1)[::-1].copy()
            found, error = hill(torch.from_numpy(values))
            assert error == pytest.approx(found / 399**0.5)
            outside += abs(found - index) > 2 * error
        assert outside <= 24
    assert hill(torch.tensor([2.0, 2.0])) == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert math.isnan(hill(torch.tensor([2.0, 0.0]))[0])
    assert math.isnan(hill(torch.tensor([2.0]))[0])


def test_hill_takes_the_tail_only():
    """A normal bulk and 2% of a power law of index 2: the bulk alone would show more than 5."""
    n = 40_000
    power = torch.from_numpy(np.random.default_rng(0).pareto(2, n // 50) + 1).float() * 6
    x = torch.cat([torch.randn(n, generator=generator()), power])
    found = tails(torch.cat([x, -x]))
    assert found.hill == pytest.approx(2, abs=4 * found.hill_se)
    assert tails(torch.randn(n, generator=generator())).hill > 5


def test_a_stream_gives_what_its_tensor_gives():
    x = torch.cat([student(3), student(5, seed=1) - 0.2])
    parts = [collect(part.view(-1, 50)) for part in x.split([17_000, 50, 33_000, 49_950])]
    whole, stream = tails(x), tails_of(parts[0] + parts[1] + parts[2] + parts[3])
    for name in ("count", "largest", "hill", "hill_se"):
        assert getattr(stream, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert stream.kurtosis == pytest.approx(whole.kurtosis, rel=1e-9)
    assert stream.peak == pytest.approx(whole.peak, rel=WIDTH)
    assert stream.beyond_sigma == pytest.approx(whole.beyond_sigma, rel=0.01)
    assert stream.beyond_median == pytest.approx(whole.beyond_median, rel=0.02)
    assert stream.effective_bits == pytest.approx(whole.effective_bits, abs=0.01)


def test_far_from_zero_the_kurtosis_keeps_its_digits_and_both_sides_count():
    x = student(3) + 50
    whole, stream = tails(x), tails_of(collect(x))
    assert stream.kurtosis == pytest.approx(whole.kurtosis, rel=1e-6)
    assert whole.beyond_sigma > 0
    assert stream.beyond_sigma == pytest.approx(whole.beyond_sigma, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=60), st.integers(0, 59))
def test_histograms_add_and_bins_hold_what_they_say(values, cut):
    x = torch.tensor(values)
    whole = collect(x)
    cut = min(cut, len(x) - 1)
    joined = collect(x[cut:]) + collect(x[:cut]) if cut else whole
    for name in ("counts", "largest"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    for name in ("sums", "squares", "powers"):
        assert torch.allclose(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-12 * 2.0**160)
    inner = (x.abs() >= 2.0**-32) & (x.abs() < 2.0**32)
    borders = edges()
    for value in x[inner]:
        place = int(collect(value[None]).occupied[0])
        low, high = borders[place].item(), borders[place + 1].item()
        assert low <= abs(value.item()) < high
        assert (high - low) <= WIDTH * abs(value.item()) or place == 0


def test_quantiles_are_within_a_bin_and_ends_are_exact():
    x = student(2)
    found = collect(x)
    for share in (0.1, 0.5, 0.999):
        assert found.quantile(share) == pytest.approx(x.abs().quantile(share).item(), rel=WIDTH + 1e-3)
    assert found.quantile(1.0) == x.abs().max().item()
    assert found.above(0.3) == pytest.approx((x > 0.3).sum().item(), rel=5e-3)
    assert found.above(-0.3) == pytest.approx((x > -0.3).sum().item(), rel=5e-3)
    with pytest.raises(ValueError, match="got 0"):
        found.quantile(0)


def test_what_is_beyond_the_bins_lies_in_the_outer_ones():
    found = collect(torch.tensor([0.0, -0.0, 1e-30, 2.0**33, -3e38]))
    assert found.occupied.tolist() == [0, BINS - 1]
    assert found.counts.sum(0)[found.occupied].tolist() == [3, 2]
    assert found.largest[0].item() == pytest.approx(3e38)
    assert len(collect(torch.ones(LARGEST + 5)).largest) == LARGEST


def test_values_that_have_no_tails():
    for broken in (torch.tensor([]), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match=r"finite|no values"):
            tails(broken)
        with pytest.raises(ValueError, match=r"finite|no values"):
            collect(broken)
    for found in (tails(torch.zeros(50)), tails_of(collect(torch.zeros(50)))):
        assert math.isnan(found.kurtosis)
        assert found.effective_bits == 0
        assert found.peak == math.inf
    sparse = torch.cat([torch.zeros(60), torch.ones(40)])
    for found in (tails(sparse), tails_of(collect(sparse))):
        assert found.beyond_median == pytest.approx(0.4)
        assert found.peak == math.inf

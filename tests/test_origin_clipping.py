"""Clip and round against the error of weights that are really cut and rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.outliers.clipping import CLIPS, Clipping, clip_curve, clip_split


def drawn(rows, columns, seed=0, tail=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.pow(3) if tail else weight


def errors(weight, bits, size, clip):
    """Squared errors of every weight cut and rounded, and which were cut; in double precision, a group at a time."""
    weight = weight.double()
    highest = 2 ** (bits - 1) - 1
    squares, cut = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size or weight.shape[1]):
            part = slice(start, start + (size or weight.shape[1]))
            group = weight[row, part]
            limit = clip * group.abs().max()
            step = limit / highest
            codes = (group.clamp(-limit, limit) / step).round().clamp(-highest, highest)
            squares[row, part] = (group - step * codes).square()
            cut[row, part] = group.abs() > limit
    return squares, cut


@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_split_sums_to_the_error_of_rounding(bits, size):
    weight = drawn(300, 70)  # more rows than one tile, a last group of six columns
    curve = clip_curve(weight, bits, size)
    for index in (0, 5, 11, 15):
        squares, cut = errors(weight, bits, size, CLIPS[index])
        total = curve.clipped[index] + curve.rounded[index]
        torch.testing.assert_close(total, squares.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(curve.clipped[index], (squares * cut).sum(0), rtol=1e-4, atol=1e-4)
        # A weight at the very limit may be counted on either side.
        assert abs(curve.beyond[index] - cut.sum()) <= 2
    assert not curve.clipped[-1].any()


@pytest.mark.parametrize("size", [16, None])
def test_the_best_clip_is_that_of_a_grid_search(size):
    weight = drawn(24, 64, seed=3)
    inputs = torch.rand(64, generator=torch.Generator().manual_seed(4)).pow(6)
    split = clip_split("s", "mlp_in", size, clip_curve(weight, 3, size), inputs)
    tried = [errors(weight, 3, size, clip) for clip in CLIPS]
    plain = [squares.sum().item() for squares, _ in tried]
    weighted = [(squares.sum(0) @ inputs.double()).item() for squares, _ in tried]
    at = plain.index(min(plain))
    assert split.best == CLIPS[at] < 1
    assert split.best_weighted == CLIPS[weighted.index(min(weighted))]
    energy = weight.double().square().sum().item()
    assert split.error == pytest.approx(plain[at] / energy, rel=1e-5)
    assert split.unclipped == pytest.approx(plain[-1] / energy, rel=1e-5)
    assert split.gain == pytest.approx(1 - plain[at] / plain[-1], rel=1e-4)
    squares, cut = tried[at]
    assert split.beyond == pytest.approx(cut.double().mean().item(), abs=2 / cut.numel())
    assert split.share == pytest.approx((squares * cut).sum().item() / plain[at], rel=1e-3)
    assert split.clipped[at] + split.rounded[at] == pytest.approx(split.error)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    size=st.one_of(st.none(), st.integers(1, 50)),
    bits=st.integers(2, 8),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_what_holds_of_every_curve(rows, columns, size, bits, scale, seed):
    """Cutting less cuts less; no clip loses more than half a step per weight; units do not matter."""
    weight = drawn(rows, columns, seed)
    curve = clip_curve(weight, bits, size)
    assert (curve.clipped.diff(dim=0) <= 1e-6 * curve.energy).all()
    assert (curve.beyond.diff() <= 0).all()
    half = weight.abs().max().double() / (2 ** (bits - 1) - 1) / 2
    assert (curve.rounded <= rows * half**2 * (1 + 1e-4)).all()
    other = clip_curve(weight * scale, bits, size)
    # A weight halfway between two codes may go either way, at the same error.
    torch.testing.assert_close(
        other.rounded / scale**2, curve.rounded, rtol=1e-3, atol=1e-6 * curve.energy.max().item()
    )


def test_one_huge_weight_is_what_a_clip_loses():
    """Nine tenths of a row's energy in one weight: cutting costs more than all rounding saves."""
    weight = 0.01 * drawn(64, 64, seed=5, tail=False)
    weight[:, 7] = 1.0
    split = clip_split("s", "mlp_out", None, clip_curve(weight, 4, None), torch.ones(64))
    assert split.best == 1.0
    assert split.gain == 0.0
    assert split.beyond == 0.0


def test_zeros_have_no_error():
    split = clip_split("s", "other", None, clip_curve(torch.zeros(4, 8), 4, None), torch.ones(8))
    assert split.error == split.unclipped == 0.0


def test_a_grid_needs_a_level():
    with pytest.raises(ValueError, match="needs 2 bits, got 1"):
        clip_curve(torch.ones(2, 2), 1, None)


def test_longer_rows_are_clipped_more_and_the_worst_sites_keep_their_curves():
    normal = drawn(128, 512, tail=False)
    even = torch.ones(512)
    splits = [
        clip_split(f"{name}.{size}", "mlp_in", size, clip_curve(weight, 4, size), even)
        for name, weight in (("plain", normal), ("tailed", drawn(128, 512)))
        for size in (64, None)
    ]
    short, long = splits[:2]
    assert long.best < short.best <= 1
    result = Clipping(4, tuple(splits), (short, long))
    assert [split.site for split in result.worst()] == ["tailed.64", "tailed.None"]
    kept = result.to_dict()
    assert len(kept["curves"]) == 4
    assert len(kept["curves"][0]["clipped"]) == len(CLIPS) == 16
    assert "clipped" not in kept["sites"][0]
    assert splits[1].gain > splits[3].gain  # the tail is worth its bits: clipping helps normal weights more
    assert "(plain.None; normal" in result.finding()
    assert "no site" in Clipping(4, (), ()).finding()

"""Interventions against their formulas, and nothing but the part ever changed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.errors import UserError
from geoquant.lattice.grid import Grid
from geoquant.outliers.interventions import KINDS, Intervention, Part, block_of_columns, intervene, largest, parse

SITE = "model.layers.0.mlp.down_proj"
ALL = Part(SITE)


def matrix(rows=6, columns=150, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_quantize_is_the_nearest_code_of_a_step_per_row_and_64_columns():
    weight = matrix()
    found = intervene(weight, ALL, parse("quantize@3"))
    grid = Grid(bits=3, group_size=64)
    codes = torch.arange(grid.lowest, grid.highest + 1).float()
    for row in range(6):
        for start in (0, 64, 128):
            own, new = (m[row, start : start + 64].double() for m in (weight, found))
            # The step is the smallest difference of values, unless neighbouring codes never occur together.
            levels = new.unique()
            assert len(levels) <= 8
            step = float(min(levels.diff().min(), levels.abs()[levels != 0].min()))
            sign = 1 if new.min() < -3.5 * step else -1 if new.max() > 3.5 * step else 0
            tried = [signed * step * codes.double() for signed in ([sign] if sign else [1, -1])]
            nearest = [grid_[(own[:, None] - grid_).abs().argmin(1)] for grid_ in tried]
            assert any(torch.allclose(new, one, atol=1e-5) for one in nearest)
            # No worse than the step that reaches the largest weight.
            plain = own.abs().max() / 3
            rounded = (own / plain).round().clamp(-4, 3) * plain
            assert (new - own).square().sum() <= 1.01 * (rounded - own).square().sum()


def test_eight_bits_round_finer_than_two_and_none_round_twice():
    weight = matrix()
    errors = [(intervene(weight, ALL, parse(f"quantize@{b}")) - weight).square().sum() for b in range(2, 9)]
    assert all(fine < 0.4 * coarse for coarse, fine in pairwise(errors))
    once = intervene(weight, ALL, parse("quantize@4"))
    torch.testing.assert_close(intervene(once, ALL, parse("quantize@4")), once, rtol=0.01, atol=0.02)


def test_zero_revert_and_clip_by_formula():
    weight, base = matrix(), matrix(seed=1)
    part = block_of_columns(SITE, 10, 13)
    inside = torch.zeros_like(weight, dtype=torch.bool)
    inside[:, 10:13] = True
    assert torch.equal(intervene(weight, part, parse("zero")), weight.masked_fill(inside, 0))
    assert torch.equal(intervene(weight, part, parse("revert"), base), torch.where(inside, base, weight))
    sizes = weight.abs().flatten().sort().values
    limit = sizes[449].item()  # 900 weights: half of them lie at or below the 450th
    clipped = intervene(weight, ALL, parse("clip@0.5"))
    assert torch.equal(clipped, weight.clamp(-limit, limit))
    assert torch.equal(intervene(weight, part, parse("clip@0.5")), torch.where(inside, clipped, weight))


def test_noise_has_the_size_of_the_part_and_comes_from_its_seed():
    weight = matrix(200, 300)
    weight[:, 100:] *= 50
    part = block_of_columns(SITE, 0, 100)
    change = intervene(weight, part, parse("noise@0.2")) - weight
    # 20,000 draws: the standard deviation is known to half a per cent, the mean to 0.0014.
    assert change[:, :100].std().item() == pytest.approx(0.2 * weight[:, :100].square().mean().sqrt().item(), rel=0.03)
    assert abs(change[:, :100].mean()) < 0.006
    assert torch.corrcoef(torch.stack([change[:, :100].flatten(), weight[:, :100].flatten()]))[0, 1].abs() < 0.03
    again = intervene(weight, part, parse("noise@0.2")) - weight
    other = intervene(weight, part, parse("noise@0.2", seed=1)) - weight
    elsewhere = intervene(weight, block_of_columns("another", 0, 100), parse("noise@0.2")) - weight
    assert torch.equal(change, again)
    assert not torch.equal(change, elsewhere)
    assert not torch.equal(change, other)


@pytest.mark.parametrize("name", ["quantize@2", "zero", "noise@3", "revert", "clip@0.3"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_only_the_part_changes_and_parts_add_up(name, data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    weight, base = matrix(rows, columns, 3), matrix(rows, columns, 4)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    mask = mask.view(rows, columns)
    mask[0, 0] = True
    kept = weight.clone()
    found = intervene(weight, Part(SITE, weights=mask), parse(name), base)
    assert torch.equal(weight, kept)
    assert torch.equal(found[~mask], weight[~mask])
    flat = intervene(weight, Part(SITE, weights=mask.flatten().nonzero()[:, 0]), parse(name), base)
    assert torch.equal(found, flat)
    if not name.startswith("noise") and not mask.all():  # noise is measured by the part's own size
        rest = intervene(weight, Part(SITE, weights=~mask), parse(name), base)
        whole = intervene(weight, ALL, parse(name), base)
        assert torch.equal(torch.where(mask, found, rest), whole)


def test_columns_blocks_and_the_largest():
    weight = matrix(4, 9)
    columns = Part(SITE, columns=torch.tensor([7, 2]))
    assert columns.mask((4, 9)).sum(0).tolist() == [0, 0, 4, 0, 0, 0, 0, 4, 0]
    assert block_of_columns(SITE, 2, 5).mask((4, 9)).any(0).nonzero().flatten().tolist() == [2, 3, 4]
    top = largest(SITE, weight.abs(), 0.25)
    assert torch.equal(top.mask((4, 9)), weight.abs() >= weight.abs().flatten().sort().values[-9])
    assert largest(SITE, weight.square().sum(0), 0.3).mask((4, 9)).any(0).sum() == 3
    assert largest(SITE, weight, 1e-9).mask((4, 9)).sum() == 1
    assert [p.name for p in (ALL, block_of_columns(SITE, 0, 64), top, columns)] == [
        SITE,
        f"{SITE} columns 0..63",
        f"{SITE} top 25%",
        f"{SITE} (part)",
    ]


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"indices from 3 to 9, wanted within 0\.\.8"):
        Part(SITE, columns=torch.tensor([3, 9])).mask((4, 9))
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 2\)"):
        Part(SITE, weights=torch.ones(2, 2, dtype=torch.bool)).mask((4, 9))
    with pytest.raises(ValueError, match="holds no weight"):
        Part(SITE, columns=torch.tensor([], dtype=torch.int64)).mask((4, 9))
    with pytest.raises(ValueError, match="of columns or of weights"):
        Part(SITE, columns=torch.tensor([1]), weights=torch.tensor([1]))


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_read_as_they_are_written(kind):
    example = KINDS[kind].example
    assert str(parse(example)) == example
    assert parse(f" {example} ", seed=3) == Intervention(kind, parse(example).value, 3)


@pytest.mark.parametrize("value", [1e-5, 0.1, 3, 12.5])
def test_values_survive(value):
    assert parse(str(Intervention("noise", value))) == Intervention("noise", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantise@3", "unknown intervention 'quantise'.*did you mean 'quantize'"),
        ("quantize", "'quantize' takes a whole number of bits from 2 to 8; got no value; write quantize@3"),
        ("quantize@9", "from 2 to 8; got 9; write quantize@3"),
        ("quantize@2.5", "got 2.5"),
        ("quantize@three", "cannot read the intervention 'quantize@three'; wanted quantize@3"),
        ("zero@1", "'zero' takes no value; got 1; write zero"),
        ("noise@0", "above 0; got 0"),
        ("noise@nan", "above 0; got nan"),
        ("clip@1", "between 0 and 1; got 1"),
        ("", "unknown intervention ''"),
    ],
)
def test_names_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_reverting_needs_the_same_site_of_a_base():
    with pytest.raises(UserError, match="needs a base model; give the public base with --base"):
        intervene(matrix(), ALL, parse("revert"))
    with pytest.raises(ValueError, match="a base weight of shape"):
        intervene(matrix(), ALL, parse("revert"), matrix(2, 3))

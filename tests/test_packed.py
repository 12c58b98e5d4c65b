"""The runtime form: nothing is lost whatever the codes, and products agree with dense ones in float64."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.export import packed
from geoquant.export.packed import WIDTHS, Packed, pack
from geoquant.lattice.unboxed import steps_of

REACHES = (0, 7, 8, 20, 127, 129, 300, 32767, 40_000, (1 << 31) - 1)


@st.composite
def matrices(draw):
    """Codes and exponents: mostly small, some beyond `reach`, or all, or the ends of int32."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 21))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    reach, share = draw(st.sampled_from(REACHES)), draw(st.sampled_from((0.0, 0.05, 0.3, 1.0)))
    small = torch.randint(-8, 8, (rows, columns), generator=generator)
    far = torch.randint(-reach - 1, reach + 1, (rows, columns), generator=generator)
    far[torch.rand(far.shape, generator=generator) < 0.2] = reach
    codes = torch.where(torch.rand(far.shape, generator=generator) < share, far, small).to(torch.int32)
    exponents = [torch.randint(-90, 40, (count,), generator=generator).to(torch.int16) for count in (rows, columns)]
    return codes, *exponents


def dense(codes, rows, columns):
    """As the run has it."""
    return codes.float().mul_(steps_of(rows)[:, None]).mul_(steps_of(columns))


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from((None, *WIDTHS)))
def test_nothing_is_lost(matrix, width):
    """Codes and weights bit for bit, in torch and compiled, all rows, some, and one twice."""
    codes, *exponents = matrix
    form, truth = pack(*matrix, width), dense(codes, *exponents)
    form.check()
    assert torch.equal(form.codes(slice(None)), codes)
    assert torch.equal(form.rows(slice(None)), truth)
    if form.compilable:
        for first in (0, len(codes) // 2):
            for dtype in (torch.float32, torch.bfloat16):
                found = form.unpacked(packed.compiled(), first, len(codes), dtype)
                assert torch.equal(found, truth[first:].to(dtype))
    index = torch.tensor([len(codes) - 1, 0, len(codes) - 1])
    assert torch.equal(form.rows(index), truth[index])


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_the_width_is_the_smallest_form(matrix):
    sizes = {width: pack(*matrix, width).nbytes for width in WIDTHS}
    assert pack(*matrix).nbytes == min(sizes.values())


@settings(max_examples=150, deadline=None)
@given(matrices(), st.integers(1, 10), st.sampled_from((None, *WIDTHS)), st.booleans())
def test_products_are_those_of_the_dense_matrix(matrix, tokens, width, plain):
    """Within 2e-6 of the sum of magnitudes, compiled or plain: float32's epsilon times a few, for 21 columns.

    The compiled one adds codes plus 8 and takes 8 back, so its magnitudes are those of codes no smaller than 8.
    """
    codes, *exponents = matrix
    form, truth = pack(*matrix, width), dense(codes, *exponents).double()
    x = torch.randn(tokens, codes.shape[1], generator=torch.Generator().manual_seed(tokens))
    if plain:
        y = form.in_blocks(x, lambda first, last: form.rows(slice(first, last)))
    else:
        y = form.multiply(x)
    size = dense(codes.double().abs().clamp_min(8).float(), *exponents).double()
    assert y.dtype == x.dtype
    assert ((y - x.double() @ truth.T).abs() <= 2e-6 * (x.double().abs() @ size.T)).all()


def example(rows=70, columns=33, share=0.05):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int32)
    codes[torch.rand(codes.shape, generator=generator) < share] = 300
    exponents = [torch.randint(-40, 0, (n,), generator=generator, dtype=torch.int16) for n in (rows, columns)]
    return codes, *exponents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 5), (0,)])
def test_any_shape_and_type_of_input(shape, dtype):
    matrix = example()
    x = torch.randn(*shape, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = pack(*matrix).multiply(x)
    assert (y.shape, y.dtype) == ((*shape, 70), dtype)
    truth = x.double() @ dense(*matrix).double().T
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance * dense(*matrix).abs().max().item())


def test_blocks_and_threads_change_nothing(monkeypatch):
    """A matrix in many parts: packed in parts, unpacked in parts, multiplied by three threads."""
    matrix = example()
    whole, x = pack(*matrix), torch.randn(12, 33, generator=torch.Generator().manual_seed(1))
    few, many, plain = whole.multiply(x[:3]), whole.multiply(x), whole.rows(slice(None))
    monkeypatch.setattr(packed, "BLOCK", 64)
    monkeypatch.setattr(packed, "SHARE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = pack(*matrix)
    for name, tensor in whole.tensors.items():
        assert torch.equal(parts.tensors[name], tensor)
    assert torch.equal(parts.multiply(x[:3]), few)
    torch.testing.assert_close(parts.multiply(x), many, rtol=1e-5, atol=1e-4)
    assert torch.equal(parts.rows(slice(None)), plain)


def test_without_numba_torch_does_it(monkeypatch):
    matrix = example()
    x = torch.randn(2, 33)
    monkeypatch.setitem(sys.modules, "geoquant.export.matvec", None)
    monkeypatch.delattr("geoquant.export.matvec")
    packed.compiled.cache_clear()
    try:
        assert packed.compiled() is None
        y = pack(*matrix).multiply(x)
    finally:
        packed.compiled.cache_clear()
    torch.testing.assert_close(y, x @ dense(*matrix).T, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_input():
    matrix = example()
    x = torch.randn(2, 33, requires_grad=True)
    pack(*matrix).multiply(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(*matrix).sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_a_copy_is_a_form_of_its_own():
    form = pack(*example())
    form.multiply(torch.randn(1, 33))
    again = copy.deepcopy(form)
    again.dense.zero_()
    again.excess.zero_()
    assert torch.equal(form.codes(slice(None)), example()[0])
    x = torch.ones(1, 33)
    torch.testing.assert_close(again.multiply(x), x @ again.rows(slice(None)).T, rtol=1e-4, atol=1e-3)


def test_columns_beyond_sixteen_bits():
    codes = torch.zeros(2, 40_000, dtype=torch.int32)
    codes[1, 39_999] = 9
    form = pack(codes, torch.zeros(2, dtype=torch.int16), torch.zeros(40_000, dtype=torch.int16), 4)
    assert form.places.dtype == torch.int32
    assert torch.equal(form.codes(slice(None)), codes)
    assert form.multiply(torch.ones(1, 40_000)).tolist() == [[0.0, 9.0]]


@pytest.mark.parametrize(
    "change", [{"places": 33}, {"places": -1}, {"pointers": -1}, {"pointers": 1000}], ids=lambda c: str(c)
)
def test_a_list_that_points_outside_is_noticed(change):
    form = pack(*example(), 4)
    for name, value in change.items():
        getattr(form, name)[1] = value
    with pytest.raises(ValueError, match="outside of the matrix"):
        form.check()


def test_sizes_are_what_the_layout_says():
    codes, *exponents = example()
    form = pack(codes, *exponents, 4)
    beyond = int((codes > 7).sum())
    assert isinstance(form, Packed)
    assert form.nbytes == 70 * 17 + 71 * 4 + beyond * (2 + 2) + 2 * (70 + 33)

"""The packer against compressed-tensors' own functions, and against bits read one by one."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from export_cases import rtn, values
from geoquant.export.compressed_tensors import file_group, pack, site_tensors, stored_bits, word_bits
from geoquant.lattice.grid import Grid


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int64).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000))
def test_pack_equals_the_readers_own_packer(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


def test_pack_puts_code_j_at_bit_j_times_width():
    codes = torch.tensor([[-8, 7, 0, 1, -1, 3, -3, 5, 6]], dtype=torch.int8)
    words = [int(word) & 0xFFFFFFFF for word in pack(codes, 4)[0]]
    assert words == [0xD5B7_98F0, 0x0000_000E]


def test_pack_accepts_transposed_codes():
    codes = random_codes(24, 16, 4, 0)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"exceed 2 signed bits: -3\.\.1"):
        pack(torch.tensor([[-3, 1]], dtype=torch.int8), 2)
    with pytest.raises(ValueError, match=r"must be int8, got torch\.uint8"):
        pack(torch.zeros(1, 4, dtype=torch.uint8), 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (64, 64), (40, 64), (80, 32), (48, 36)])
def test_file_decodes_to_the_solved_values(bits, symmetric, columns, group):
    """Unpack with the reader's function, apply the file's groups by hand: the solved weights, exactly."""
    if bits == 8 and not symmetric:
        pytest.skip("refused: see test_export_refusals")
    grid = Grid(bits, group, symmetric)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(bits))
    weight[:, :3] *= 4.0  # skewed groups, so that zero points are not in the middle
    solution = rtn(weight + 0.7, grid)
    tensors = site_tensors("x", solution)
    codes = unpack_from_int32(tensors["x.weight_packed"], word_bits(grid), tensors["x.weight_shape"])
    scales = tensors["x.weight_scale"].float()
    assert columns % scales.shape[1] == 0
    decoded = codes.float() * scales.repeat_interleave(columns // scales.shape[1], dim=1)
    assert torch.equal(decoded, values(solution))


def test_extreme_zero_points_survive():
    """Zero points at both ends of the box: folded codes reach +-(2^b - 1)."""
    for bits in (2, 3, 4, 7):
        top = (1 << bits) - 1
        solution = rtn(torch.ones(2, 32), Grid(bits, 32, symmetric=False))
        codes = torch.tensor([0, top] * 16, dtype=torch.uint8).repeat(2, 1)
        zero = torch.tensor([[0], [top]], dtype=torch.uint8)
        object.__setattr__(solution, "codes", codes)
        object.__setattr__(solution, "zero_points", zero)
        packed = site_tensors("x", solution)["x.weight_packed"]
        back = unpack_from_int32(packed, word_bits(solution.grid), (2, 32))
        assert torch.equal(back.int(), codes.int() - zero.int())
        assert back.min() == -top
        assert back.max() == top


def test_stored_bits_count_what_the_tensors_hold():
    for grid in (Grid(2, 32), Grid(3, 32), Grid(3, 32, False), Grid(4, 32, False), Grid(4, 48), Grid(8, 128)):
        tensors = site_tensors("x", rtn(torch.randn(8, 96), grid))
        bits = 8 * sum(t.nbytes for key, t in tensors.items() if not key.endswith("shape")) / (8 * 96)
        assert bits == stored_bits(grid, 96)


@pytest.mark.parametrize(
    ("columns", "group", "wanted"), [(576, 64, 64), (80, 64, 16), (48, 32, 16), (64, 64, -1), (64, 99, -1)]
)
def test_group_in_the_file(columns, group, wanted):
    assert file_group(Grid(4, group), columns) == wanted

"""GPTQ files against an unpacker of their documented layout, and against GPTQModel where it is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import make_tokenizer
from export_cases import logits_of, rtn, site_names, small_llama, solve, values
from geoquant.errors import UserError
from geoquant.export import check, snippet
from geoquant.export.adapter import export_adapter
from geoquant.export.gptq import Scheme, export_gptq, pack, refuse_or_note, scheme_of, site_tensors
from geoquant.export.verify import verify, write_expected
from geoquant.lattice.grid import Grid
from gptq_bits import decode, stream

READER = all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum"))
needs_reader = pytest.mark.skipif(not READER, reason="needs gptqmodel and optimum")


def config_of(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == config
    return config


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 5), st.integers(0, 1000))
def test_packed_codes_come_back_bit_by_bit(bits, count, width, seed):
    codes = torch.randint(0, 1 << bits, (count, width), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.shape == (-(-count * bits // 32), width)
    assert [stream(words[:, column].numpy(), count, bits) for column in range(width)] == codes.T.tolist()


def test_a_three_bit_code_straddles_words():
    """Code 10 has bits 30..32, code 21 bits 63..65: the low part of each ends its word."""
    codes = torch.zeros(32, 1, dtype=torch.int64)
    codes[10], codes[21] = 0b110, 0b011
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, 3)[:, 0]] == [0b10 << 30, 1 | 1 << 31, 0b01]


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"exceed 3 unsigned bits: 0\.\.8"):
        pack(torch.tensor([[0], [8]]), 3)
    with pytest.raises(ValueError, match=r"exceed 4 unsigned bits: -1\.\.0"):
        pack(torch.tensor([[0], [-1]]), 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_code_zero_point_and_weight_survives(tmp_path, bits, symmetric):
    model = small_llama(num_hidden_layers=1)
    solutions = solve(model, lambda position: Grid(bits, 32, symmetric))
    result = export_gptq(model, make_tokenizer(), solutions, tmp_path / "gptq")
    tensors, config = load_file(tmp_path / "gptq/model.safetensors"), config_of(tmp_path / "gptq")
    assert config["bits"] == (bits if bits in (2, 3, 4, 8) else 8)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    middle = 1 << (config["bits"] - 1)
    for name, solution in solutions.items():
        codes, zeros, weights = decode(tensors, name, config)
        assert np.array_equal(codes, solution.codes.numpy().astype(int) + (middle if symmetric else 0))
        assert np.array_equal(zeros, np.full_like(zeros, middle) if symmetric else solution.zero_points.numpy())
        assert np.array_equal(weights, values(solution).numpy())
        assert f"{name}.weight" not in tensors
    assert result.notes == ()
    linear = sum(t.nbytes for key, t in tensors.items() if key.rpartition(".")[0] in solutions)
    assert result.bytes_linear == linear


def test_zero_points_at_both_ends_of_the_box():
    for bits in (2, 3, 4, 8):
        top = (1 << bits) - 1
        solution = rtn(torch.ones(32, 32), Grid(bits, 32, symmetric=False))
        object.__setattr__(solution, "codes", torch.tensor([0, top] * 16, dtype=torch.uint8).repeat(32, 1))
        object.__setattr__(solution, "zero_points", torch.tensor([[0], [top]] * 16, dtype=torch.uint8))
        scheme = Scheme(bits, -1, symmetric=False)
        codes, zeros, weights = decode(
            site_tensors("x", solution, scheme)[0], "x", {"bits": bits, "checkpoint_format": "gptq_v2"}
        )
        assert np.array_equal(codes, solution.codes.numpy())
        assert np.array_equal(zeros, solution.zero_points.numpy())
        assert np.array_equal(weights, values(solution).numpy())


MIXED = (Grid(2, 32), Grid(4, 32, False), Grid(4, 16), Grid(8, 200))


def test_sites_of_different_grids_share_one_scheme_and_keep_their_values(tmp_path):
    model = small_llama(tie_word_embeddings=False, attention_bias=True)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_()
    solutions = solve(model, lambda position: MIXED[position % 4])
    export_gptq(model, None, solutions, tmp_path / "gptq")
    tensors, config = load_file(tmp_path / "gptq/model.safetensors"), config_of(tmp_path / "gptq")
    assert (config["bits"], config["group_size"], config["sym"]) == (8, 16, False)
    for name, solution in solutions.items():
        assert np.array_equal(decode(tensors, name, config)[2], values(solution).numpy())
    assert "lm_head.weight" in tensors
    assert "model.layers.0.self_attn.q_proj.bias" in tensors


@pytest.mark.parametrize(
    ("sites", "wanted"),
    [
        ([(Grid(4, 64), 64, 64), (Grid(4, 64), 64, 128)], Scheme(4, 64, True)),
        ([(Grid(4, 64), 64, 64), (Grid(4, 64), 64, 96)], Scheme(4, 32, True)),  # no remainder where 32 divides all
        ([(Grid(4, 64), 64, 100)], Scheme(4, 64, True)),  # a remainder that nothing avoids
        ([(Grid(4, 48), 64, 96)], Scheme(4, 16, True)),
        ([(Grid(8, 576), 64, 576), (Grid(8, 1536), 64, 1536)], Scheme(8, -1, True)),
        ([(Grid(3, 32), 64, 64)], Scheme(3, 32, True)),
        ([(Grid(3, 16), 64, 80)], Scheme(4, 16, True)),
        ([(Grid(3, 32), 48, 64)], Scheme(4, 32, True)),
        ([(Grid(4, 4096), 64, 4096)], Scheme(4, -1, True)),
        ([(Grid(4, 2048), 64, 4096)], Scheme(4, 1024, True)),
        ([(Grid(2, 32), 64, 64), (Grid(3, 32, False), 64, 64)], Scheme(3, 32, False)),
    ],
)
def test_the_scheme_of_a_file(sites, wanted):
    assert scheme_of(sites) == wanted


@pytest.mark.parametrize(("hidden", "group"), [(80, 48), (72, 64), (80, 40)])
def test_groups_and_remainders(tmp_path, hidden, group):
    """48 over 80 and 96 columns (16), 64 over 72 (a last group of 8), 40 over 80 (refused: no multiple of 16)."""
    model = small_llama(num_hidden_layers=1, hidden_size=hidden, num_attention_heads=4)
    solutions = solve(model, lambda position: Grid(3, group))
    if group == 40:
        with pytest.raises(UserError, match=r"groups of 16, 32, 64 \.\.\. 1024 columns only; got 40; choose --group"):
            export_gptq(model, None, solutions, tmp_path / "gptq")
        assert list(tmp_path.iterdir()) == []
        return
    export_gptq(model, None, solutions, tmp_path / "gptq")
    tensors, config = load_file(tmp_path / "gptq/model.safetensors"), config_of(tmp_path / "gptq")
    for name, solution in solutions.items():
        assert np.array_equal(decode(tensors, name, config)[2], values(solution).numpy())
        size = config["group_size"]
        assert tensors[f"{name}.g_idx"].tolist() == [j // size for j in range(solution.codes.shape[1])]


def test_stored_bits_count_what_the_tensors_hold():
    for grid in (Grid(2, 32), Grid(3, 32), Grid(3, 32, False), Grid(4, 48), Grid(8, 128)):
        scheme = scheme_of([(grid, 32, 96)])
        tensors, _ = site_tensors("x", rtn(torch.randn(32, 96), grid), scheme)
        assert 8 * sum(t.nbytes for t in tensors.values()) / (32 * 96) == scheme.stored_bits(32, 96)


def stepped(scale: float, code: int):
    """A site of 32 x 32 whose first row has one group with this step and code."""
    solution = rtn(torch.ones(32, 32), Grid(4, 32))
    solution.scales[0], solution.codes[0] = scale, code
    return solution


def test_a_step_beyond_float16_is_refused_and_nothing_is_written(tmp_path):
    model = small_llama(num_hidden_layers=1)
    solutions = solve(model, lambda position: Grid(4, 32))
    solutions["model.layers.0.mlp.up_proj"].scales[3, 1] = -(2.0**17)
    with pytest.raises(UserError, match=r"mlp\.up_proj has steps that float16 cannot hold; got 1\.31e\+05; wanted at"):
        export_gptq(model, None, solutions, tmp_path / "gptq")
    assert list(tmp_path.iterdir()) == []


def test_small_steps_are_rounded_and_told():
    scheme = Scheme(4, -1, symmetric=True)
    solution = stepped(3e-7, 5)
    tensors, rounding = site_tensors("x", solution, scheme)
    moved = abs(tensors["x.scales"][0, 0].item() - solution.scales[0, 0].item()) * 5
    assert rounding.steps == 1
    assert rounding.largest == pytest.approx(moved)
    assert rounding.notes() == (f"1 steps or offsets were rounded to float16; weights changed by at most {moved:.2g}",)
    # 2^-17 with all digits of bfloat16 is the smallest that is surely kept.
    assert site_tensors("x", stepped(2**-17 * 1.9921875, 5), scheme)[1].notes() == ()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_steps_of_groups_of_zeros_do_not_matter(scale):
    tensors, rounding = site_tensors("x", stepped(scale, 0), Scheme(4, -1, symmetric=True))
    assert rounding.notes() == ()
    assert tensors["x.scales"][0, 0] == 0


def every_site(model, grid: Grid) -> dict[str, Grid]:
    return dict.fromkeys(site_names(model), grid)


def test_check_tells_what_the_file_costs():
    model = small_llama()
    assert refuse_or_note(model, every_site(model, Grid(4, 32))) == ()
    assert check("gptq", model, every_site(model, Grid(5, 32))) == ("5-bit codes are stored in 8 bits",)
    assert check("gptq", model, every_site(model, Grid(4, 64))) == (
        "groups are written as groups of 32 columns with repeated steps",
    )
    odd = small_llama(hidden_size=72, num_attention_heads=4)
    assert check("gptq", odd, every_site(odd, Grid(3, 64))) == (
        "3-bit codes are stored in 4 bits: 3-bit words need rows and columns in multiples of 32",
        "groups of 64 do not divide the 72 columns of model.layers.0.self_attn.q_proj: GPTQModel's torch kernel reads "
        "that, most other kernels refuse it",
    )
    assert check("gptq", model, every_site(model, Grid(4, 32)), keep=0.01) == (
        "kept columns go into a PEFT adapter: readers must load model and adapter together",
    )


def test_check_refuses_what_no_reader_loads():
    model = small_llama(tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"groups of 16, 32, 64 \.\.\. 1024 columns only; got 40"):
        check("gptq", model, every_site(model, Grid(4, 40)))
    with pytest.raises(UserError, match=r"keep the vocabulary projection \(lm_head\) as it is; leave it unquantized"):
        check("gptq", model, {"lm_head": Grid(4, 32)})
    with pytest.raises(UserError, match="format gptq needs column steps that fold away"):
        check("gptq", model, {"model.layers.0.self_attn.q_proj": None}, foldable=False)


READ = [
    ("symmetric", lambda position: Grid(4, 32), {}, True),
    ("asymmetric", lambda position: Grid(4, 32, False), {}, False),
    ("three bits", lambda position: Grid(3, 32, False), {}, True),
    ("per channel", lambda position: Grid(8, 200), {}, False),
    ("remainder", lambda position: Grid(4, 64), {"hidden_size": 72, "num_attention_heads": 4}, True),
    ("mixed", lambda position: MIXED[position % 4], {"tie_word_embeddings": False, "attention_bias": True}, False),
]


@needs_reader
@pytest.mark.parametrize(("grid_of", "changes", "exact"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_gptqmodel_reads_it(tmp_path, grid_of, changes, exact):
    """In a fresh process, in float32; `exact`: code times step fits the 11 bits of float16, in which it multiplies."""
    model = small_llama(**changes)
    export_gptq(model, make_tokenizer(), solve(model, grid_of), tmp_path / "gptq")
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 60)[None])
    result = verify(tmp_path / "gptq", tmp_path / "expected.safetensors")
    assert result.max_rel <= (0 if exact else 0.01)
    assert result.tolerance == 0.05
    assert result.independent
    assert {"gptqmodel", "optimum"} <= result.versions.keys()


@needs_reader
def test_a_wrong_site_is_noticed(tmp_path):
    model = small_llama(num_hidden_layers=1)
    solutions = solve(model, lambda position: Grid(4, 32))
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 60)[None])
    solutions["model.layers.0.mlp.up_proj"].scales.neg_()
    export_gptq(model, None, solutions, tmp_path / "gptq")
    assert not verify(tmp_path / "gptq", tmp_path / "expected.safetensors").ok


@needs_reader
def test_only_some_sites_are_read_as_codes(tmp_path):
    model = small_llama()
    name = "model.layers.1.mlp.down_proj"
    solution = rtn(model.get_submodule(name).weight, Grid(4, 32))
    model.get_submodule(name).weight.data.copy_(values(solution))
    export_gptq(model, make_tokenizer(), {name: solution}, tmp_path / "gptq")
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 60)[None])
    assert verify(tmp_path / "gptq", tmp_path / "expected.safetensors").max_abs_diff == 0


@needs_reader
def test_kept_columns_through_peft(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [0, 9])
    export_gptq(model, make_tokenizer(), solutions, tmp_path / "gptq")
    export_adapter(solutions, tmp_path / "adapter")
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 60)[None])
    result = verify(tmp_path / "gptq", tmp_path / "expected.safetensors", tmp_path / "adapter")
    assert result.max_rel < 1e-4
    assert not verify(tmp_path / "gptq", tmp_path / "expected.safetensors").ok


@needs_reader
def test_the_printed_snippet_works(tmp_path):
    model = small_llama()
    export_gptq(model, make_tokenizer(), solve(model, lambda position: Grid(3, 32)), tmp_path / "gptq")
    names: dict = {}
    exec(snippet(str(tmp_path / "gptq"), format="gptq"), names)
    assert (logits_of(names["model"].eval()) - logits_of(model)).abs().max() < 0.05


def test_without_the_reader_verification_names_it(tmp_path, monkeypatch):
    model = small_llama(num_hidden_layers=1)
    export_gptq(model, None, solve(model, lambda position: Grid(4, 32)), tmp_path / "gptq")
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 20)[None])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"reading .*gptq back needs gptqmodel and optimum; run: pip install"):
        verify(tmp_path / "gptq", tmp_path / "expected.safetensors")

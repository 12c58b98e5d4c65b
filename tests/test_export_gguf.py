"""GGUF files: blocks against the gguf package and against bytes read one by one, the whole against three readers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import make_tokenizer
from export_cases import logits_of, rtn, site_names, small_llama, solve, values
from geoquant.errors import UserError
from geoquant.export import check, snippet
from geoquant.export.gguf import export_gguf, rotated_rows, stored_bits
from geoquant.export.gguf_blocks import BLOCK, TYPES, block_type, blocks_of, pack
from geoquant.export.gguf_tokenizer import pre_tokenizer, vocabulary
from geoquant.export.verify import verify, write_expected
from geoquant.lattice.grid import Grid
from geoquant.model.load import load
from gguf_cases import bpe_tokenizer

LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None
needs_llama_cpp = pytest.mark.skipif(not LLAMA_CPP, reason="needs xllamacpp")

GRIDS = [Grid(bits, 32, symmetric) for bits in range(2, 9) for symmetric in (True, False) if symmetric or bits < 8]


def small_qwen2(**changes):
    """A Qwen2 with biases that matter."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=304, num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=True, **sizes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model.eval()


def half_embeddings(model):
    """Embeddings (and the head) rounded to what the file stores, so that nothing but codes is under test."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data = module.weight.data.half().float()
    return model


def read_block(kind: str, data: bytes) -> list[float]:
    """One block of 32 weights, by the table in gguf_blocks and nothing else."""
    half = np.frombuffer(data[:4], "<f2").astype(np.float32)
    body = data[4:] if kind.endswith("_1") else data[2:]
    if kind == "Q8_0":
        return [float(half[0] * np.float32(np.int8(np.uint8(byte)))) for byte in body]
    fifth = int.from_bytes(body[:4], "little") if kind.startswith("Q5") else 0
    nibbles = body[4:] if kind.startswith("Q5") else body
    low = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
    codes = [np.float32(low[j] + 16 * (fifth >> j & 1)) for j in range(32)]
    if kind.endswith("_1"):
        return [float(half[0] * code + half[1]) for code in codes]
    return [float(half[0] * (code - (16 if kind.startswith("Q5") else 8))) for code in codes]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_packed_blocks_come_back(name, rows, blocks, seed):
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if name == "Q8_0" else (0, 1 << kind.bits)
    codes = torch.randint(low, high, (rows, blocks * BLOCK), generator=generator)
    steps, offsets = torch.randn(2, rows, blocks, generator=generator).half()
    data = pack(kind, codes, steps, offsets if kind.offset else None).numpy()
    assert data.shape == (rows, blocks * kind.bytes)
    read = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    by_hand = [
        [value for place in range(blocks) for value in read_block(name, row[place * kind.bytes :][: kind.bytes])]
        for row in (line.tobytes() for line in data)
    ]
    assert np.array_equal(read, np.array(by_hand, np.float32))
    middle = 0 if kind.offset or kind.bits == 8 else 1 << (kind.bits - 1)
    wanted = steps.float().repeat_interleave(BLOCK, 1) * (codes - middle).float()
    wanted += offsets.float().repeat_interleave(BLOCK, 1) if kind.offset else 0.0
    assert np.array_equal(read, wanted.numpy())


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"codes exceed Q4_0: 0\.\.16"):
        pack(TYPES["Q4_0"], torch.arange(0, 17)[None].repeat(1, 32)[:, :32], torch.ones(1, 1).half())
    with pytest.raises(ValueError, match=r"codes exceed Q8_0: -129\.\.0"):
        pack(TYPES["Q8_0"], torch.tensor([[-129, 0] * 16]), torch.ones(1, 1).half())


@pytest.mark.parametrize("group", [32, 64, 96, 200])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_hold_the_solved_weights(grid, group):
    """Exactly, but for offsets that float16 rounds: those move a weight by no more than was told."""
    grid = Grid(grid.bits, group, grid.symmetric)
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(grid.bits))
    weight[:, :3] *= 4.0
    solution = rtn(weight + 0.7, grid)
    packed, rounding = blocks_of("x", solution)
    kind = block_type(grid)
    read = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name])
    moved = np.abs(read - values(solution).numpy()).max()
    if kind.offset:
        assert moved <= rounding.largest * (1 + 1e-6)
        assert rounding.largest < 2**-11 * 31 * float(solution.scales.abs().max())
    else:
        assert moved == 0
        assert rounding.steps == 0
    assert 8 * packed.nbytes / weight.numel() == stored_bits(grid)


def test_types_of_all_grids():
    got = {(grid.bits, grid.symmetric): block_type(grid).name for grid in GRIDS}
    symmetric = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
    asymmetric = {2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 7: "Q8_0"}
    assert got == {(b, True): n for b, n in symmetric.items()} | {(b, False): n for b, n in asymmetric.items()}
    for name, kind in TYPES.items():
        assert (BLOCK, kind.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def test_zero_points_at_both_ends_of_the_box():
    for bits in (2, 3, 4, 5, 6, 7):
        top = (1 << bits) - 1
        solution = rtn(torch.ones(2, 32), Grid(bits, 32, symmetric=False))
        object.__setattr__(solution, "codes", torch.tensor([0, top] * 16, dtype=torch.uint8).repeat(2, 1))
        object.__setattr__(solution, "zero_points", torch.tensor([[0], [top]], dtype=torch.uint8))
        object.__setattr__(solution, "scales", torch.full((2, 1), 0.5, dtype=torch.bfloat16))
        packed, rounding = blocks_of("x", solution)
        read = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[block_type(solution.grid).name])
        assert rounding.steps == 0
        assert np.array_equal(read, values(solution).numpy())


def test_offsets_beyond_float16_are_refused_and_rounded_ones_are_told():
    solution = rtn(torch.ones(2, 32), Grid(4, 32, symmetric=False))
    object.__setattr__(solution, "codes", torch.zeros(2, 32, dtype=torch.uint8))
    object.__setattr__(solution, "zero_points", torch.full((2, 1), 15, dtype=torch.uint8))
    object.__setattr__(solution, "scales", torch.full((2, 1), 1.9921875, dtype=torch.bfloat16))
    # 15 * 1.9921875 = 29.8828125 lies between two float16 numbers that are 2^-6 apart.
    assert blocks_of("x", solution)[1].notes() == (
        "2 steps or offsets were rounded to float16; weights changed by at most 0.0078",
    )
    object.__setattr__(solution, "scales", torch.full((2, 1), 3e4, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"x has offsets \(step times zero point\) that float16 cannot hold; got 4"):
        blocks_of("x", solution)


def test_rows_of_a_head_move_as_llama_cpp_rotates_them():
    config = small_llama().config  # 4 heads of 16, 2 of them for keys
    rows = rotated_rows(config, "model.layers.0.self_attn.q_proj").tolist()
    assert rows[:6] == [0, 8, 1, 9, 2, 10]
    assert rows[16:20] == [16, 24, 17, 25]
    assert sorted(rows) == list(range(64))
    assert len(rotated_rows(config, "model.layers.0.self_attn.k_proj")) == 32
    assert rotated_rows(config, "model.layers.0.self_attn.v_proj") is None
    assert rotated_rows(small_qwen2().config, "model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("make", "grid_of"),
    [
        (small_llama, lambda position: Grid(4, 32)),
        (lambda: small_llama(tie_word_embeddings=False), lambda position: Grid(8, 200)),
        (lambda: small_llama(head_dim=32), lambda position: Grid(5, 64)),
        (small_qwen2, lambda position: (Grid(3, 32, False), Grid(6, 64, False), Grid(2, 96))[position % 3]),
    ],
    ids=["llama", "per channel", "wide heads", "qwen2"],
)
def test_load_reads_the_same_weights_back(tmp_path, make, grid_of):
    model = half_embeddings(make())
    solutions = solve(model, grid_of)
    result = export_gguf(model, bpe_tokenizer(), solutions, tmp_path / "gguf")
    loaded = load(str(tmp_path / "gguf/model.gguf"), dtype=torch.float32)
    assert type(loaded.model) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    assert torch.equal(logits_of(loaded.model), logits_of(model))
    assert loaded.model.config.tie_word_embeddings == model.config.tie_word_embeddings
    text = "the lattice, naïve: 2026 <think> points"
    assert loaded.tokenizer(text)["input_ids"] == bpe_tokenizer()(text)["input_ids"]
    assert result.files == ("model.gguf",)
    assert result.bytes_total == (tmp_path / "gguf/model.gguf").stat().st_size
    weights = {name: solution.codes.numel() * stored_bits(solution.grid) for name, solution in solutions.items()}
    assert result.bytes_linear == sum(weights.values()) / 8


def test_only_some_sites_and_bfloat16(tmp_path):
    model = small_llama().bfloat16()
    name = "model.layers.1.self_attn.k_proj"
    solution = rtn(model.get_submodule(name).weight, Grid(4, 32))
    model.get_submodule(name).weight.data.copy_(values(solution))
    export_gguf(model, bpe_tokenizer(), {name: solution}, tmp_path / "gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors}
    assert types["blk.1.attn_k.weight"] == "Q4_0"
    assert types["blk.0.attn_k.weight"] == types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert "output.weight" not in types  # tied
    loaded = load(str(tmp_path / "gguf/model.gguf"), dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(key), parameter), key


def test_verify_reads_it_in_a_fresh_process(tmp_path):
    model = small_llama(num_hidden_layers=1)
    solutions = solve(model, lambda position: Grid(4, 32))
    export_gguf(model, bpe_tokenizer(), solutions, tmp_path / "gguf")
    write_expected(tmp_path / "expected.safetensors", model, torch.arange(3, 60)[None])
    result = verify(tmp_path / "gguf", tmp_path / "expected.safetensors")
    assert result.ok
    assert result.independent
    assert result.max_rel < 0.01  # the embeddings were rounded to float16
    assert result.versions.keys() == {"torch", "transformers", "gguf"}


def test_the_printed_snippet_works(tmp_path):
    model = half_embeddings(small_llama())
    export_gguf(model, bpe_tokenizer(), solve(model, lambda position: Grid(4, 32)), tmp_path / "gguf")
    names: dict = {}
    exec(snippet(str(tmp_path / "gguf"), format="gguf"), names)
    assert torch.equal(logits_of(names["model"]), logits_of(model))
    assert names["tokenizer"]("the lattice")["input_ids"] == bpe_tokenizer()("the lattice")["input_ids"]


PROMPTS = ["the lattice of the layer", "naïve 12345 it's  what\n\nthey're <think> for 7 layers", "a"]


def by_llama_cpp(path: Path, prompts: list[str], size: int) -> list[dict]:
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_reader.py")), str(path), json.dumps(prompts), str(size)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.strip().splitlines()[-1])


def divergence(path: Path, model, tokenizer) -> float:
    """Largest divergence of llama.cpp's next token from the model's, over the prompts, in nats."""
    worst = 0.0
    for prompt, found in zip(PROMPTS, by_llama_cpp(path, PROMPTS, model.config.vocab_size), strict=True):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        assert found["tokens"] == tokens.shape[1]
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits[0, -1].log_softmax(-1)
        worst = max(worst, (wanted.exp() * (wanted - torch.tensor(found["logprobs"]))).sum().item())
    return worst


@needs_llama_cpp
@pytest.mark.parametrize(
    ("make", "pre", "grid"),
    [
        (small_llama, "gpt-2", Grid(4, 32)),
        (small_llama, "smollm", Grid(4, 64, False)),
        (small_llama, "llama-bpe", Grid(5, 32)),
        (small_qwen2, "qwen2", Grid(5, 32, False)),
        (lambda: small_llama(tie_word_embeddings=False, head_dim=32), "smollm", Grid(8, 200)),
        (small_llama, "smollm", Grid(3, 32, False)),
    ],
    ids=["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_0 of asymmetric codes"],
)
def test_llama_cpp_computes_the_same(tmp_path, make, pre, grid):
    """Up to what llama.cpp rounds itself: activations to 8 bits, its cache to float16 (1e-4 to 7e-4 nats here)."""
    model, tokenizer = half_embeddings(make()), bpe_tokenizer(pre)
    export_gguf(model, tokenizer, solve(model, lambda position: grid), tmp_path / "gguf")
    assert divergence(tmp_path / "gguf/model.gguf", model, tokenizer) < 2e-3


@needs_llama_cpp
def test_llama_cpp_needs_the_rows_in_its_order(tmp_path, monkeypatch):
    model, tokenizer = half_embeddings(small_llama()), bpe_tokenizer()
    monkeypatch.setattr("geoquant.export.gguf.rotated_rows", lambda config, name: None)
    export_gguf(model, tokenizer, solve(model, lambda position: Grid(4, 32)), tmp_path / "gguf")
    assert divergence(tmp_path / "gguf/model.gguf", model, tokenizer) > 1e-2


def test_the_vocabulary_of_a_file():
    words = vocabulary(bpe_tokenizer("smollm"), 310)
    assert words.pre == "smollm"
    assert len(words.tokens) == len(words.types) == 310
    assert words.tokens[0] == "<s>"
    assert (words.types[0], words.types[10], words.types[300], words.types[309]) == (3, 1, 4, 5)
    assert words.tokens[300] == "<think>"
    assert words.special == {"bos": 0, "eos": 1, "unk": 2, "pad": 1}
    assert not words.add_bos
    assert all(len(merge.split(" ")) == 2 for merge in words.merges)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_pre_tokenizers_are_recognised(pre, tmp_path):
    tokenizer = bpe_tokenizer(pre)
    assert vocabulary(tokenizer, 301).pre == pre
    tokenizer.save_pretrained(tmp_path)
    assert vocabulary(AutoTokenizer.from_pretrained(tmp_path), 301).pre == pre
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(UserError, match=r"does not know how this tokenizer cuts text; got .*; wanted one that llama"):
        pre_tokenizer(description)


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="byte-level BPE tokenizers only; got WordLevel"):
        vocabulary(words, 10)
    pieces = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    with pytest.raises(UserError, match="byte-level BPE tokenizers only; got BPE"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=pieces), 10)
    with pytest.raises(UserError, match="a GGUF file needs a tokenizer with merges"):
        vocabulary(make_tokenizer(), 304)


def every_site(model, grid: Grid) -> dict[str, Grid]:
    return dict.fromkeys(site_names(model), grid)


def test_check_tells_what_the_file_costs():
    model = small_llama()
    assert check("gguf", model, every_site(model, Grid(4, 64)), tokenizer=bpe_tokenizer()) == ()
    assert check("gguf", model, every_site(model, Grid(3, 32))) == (
        "14 sites: 3-bit codes are stored in 4 bits (Q4_0)",
    )


def test_check_refuses_what_the_file_cannot_hold():
    model = small_llama()
    grids = every_site(model, Grid(4, 32))
    with pytest.raises(
        UserError, match=r"32 columns; got groups of 48; wanted a multiple of 32; choose --group-size 32"
    ):
        check("gguf", model, every_site(model, Grid(4, 48)))
    with pytest.raises(UserError, match=r"32 columns; got groups of 16; .*choose --group-size 32"):
        check("gguf", model, every_site(model, Grid(4, 16)))
    odd = small_llama(hidden_size=72, num_attention_heads=4)
    with pytest.raises(UserError, match=r"hold 32 columns; model\.layers\.0\.self_attn\.q_proj has 72; wanted a multi"):
        check("gguf", odd, every_site(odd, Grid(4, 72)))
    with pytest.raises(UserError, match="cannot hold 8-bit asymmetric codes"):
        check("gguf", model, every_site(model, Grid(8, 32, False)))
    with pytest.raises(UserError, match="GGUF files hold no kept columns; leave --keep out"):
        check("gguf", model, grids, keep=0.01)
    with pytest.raises(UserError, match="format gguf needs column steps that fold away"):
        check("gguf", model, dict.fromkeys(grids), foldable=False)
    with pytest.raises(UserError, match="a GGUF file needs a tokenizer with merges"):
        check("gguf", model, grids, tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope type linear"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(changes, what):
    model = small_llama(**changes)
    with pytest.raises(UserError, match=f"GGUF export of llama models does not know {what}; choose another --format"):
        check("gguf", model, every_site(model, Grid(4, 32)))


def test_other_architectures_are_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(UserError, match="does not know the architecture gpt2; wanted one of llama, qwen2; choose"):
        check("gguf", model, {"transformer.h.0.attn.c_attn": Grid()})


def test_nothing_half_written(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [1])
    with pytest.raises(UserError, match="GGUF files hold no kept columns"):
        export_gguf(model, bpe_tokenizer(), solutions, tmp_path / "gguf")
    solutions = solve(small_llama(), lambda position: Grid(4, 32))
    solutions["model.layers.1.mlp.down_proj"].scales[0] = 1e6
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj has steps that float16 cannot hold"):
        export_gguf(model, bpe_tokenizer(), solutions, tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []

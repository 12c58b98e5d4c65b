"""Exports loaded by stock transformers and PEFT: the logits must be those of the solved model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import make_tokenizer
from export_cases import logits_of, probe, rtn, site_names, small_llama, solve, values
from geoquant.export import snippet
from geoquant.export.adapter import export_adapter
from geoquant.export.compressed_tensors import export_compressed_tensors
from geoquant.export.dense import export_dense
from geoquant.lattice.grid import Grid


def load(folder, dtype=torch.float32):
    """Stock load; every key must fit."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def round_trip(tmp_path, model, solutions, **options):
    """Export, load, compare: the largest logit difference, the loaded model and the export's result."""
    wanted = logits_of(model)
    result = export_compressed_tensors(model, make_tokenizer(), solutions, tmp_path / "model", **options)
    loaded = load(tmp_path / "model")
    return (logits_of(loaded) - wanted).abs().max().item(), loaded, result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_loads_exactly(tmp_path, bits, symmetric):
    if bits == 8 and not symmetric:
        pytest.skip("refused: see test_export_refusals")
    model = small_llama(num_hidden_layers=1)
    solutions = solve(model, lambda position: Grid(bits, 32, symmetric))
    difference, loaded, _ = round_trip(tmp_path, model, solutions)
    assert difference == 0.0
    for name in site_names(model):
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_packed_folder_is_opened_without_the_readers_chatter(tmp_path, capfd):
    """The reader draws a bar for every model it unpacks; progress is ours to show."""
    from geoquant.model.load import load as open_model

    model = small_llama()
    round_trip(tmp_path, model, solve(model, lambda position: Grid(4, 32, True)))
    capfd.readouterr()
    open_model(str(tmp_path / "model"), quantized=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("group", [40, 64, 200])
def test_groups_that_do_not_divide_the_columns(tmp_path, group):
    """40 over 64 and 96 columns (8 and 8 in the file), 64 over 96 (32), 200: one group per row."""
    model = small_llama(num_hidden_layers=1)
    difference, _, _ = round_trip(tmp_path, model, solve(model, lambda position: Grid(4, group)))
    assert difference == 0.0


def test_mixed_schemes_untied_head_and_biases(tmp_path):
    grids = (Grid(2, 32), Grid(4, 32, False), Grid(4, 16), Grid(8, 200))
    model = small_llama(tie_word_embeddings=False, attention_bias=True)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_()
    difference, loaded, _ = round_trip(tmp_path, model, solve(model, lambda position: grids[position % 4]))
    assert difference == 0.0
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 4
    assert config["ignore"] == ["lm_head"]


def test_only_some_sites_are_quantized(tmp_path):
    model = small_llama()
    name = "model.layers.1.mlp.down_proj"
    solution = rtn(model.get_submodule(name).weight, Grid(4, 32))
    model.get_submodule(name).weight.data.copy_(values(solution))
    difference, _, _ = round_trip(tmp_path, model, {name: solution})
    assert difference == 0.0


def test_tied_head_is_stored_once_and_tied_again(tmp_path):
    model = small_llama()
    _, loaded, _ = round_trip(tmp_path, model, solve(model, lambda position: Grid(4, 32)))
    names = load_file(tmp_path / "model/model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_many_shards_read_each_solution_once(tmp_path):
    """Shards of 4 KiB, solutions from a generator, untouched tensors in bfloat16."""
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32))
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in solutions:
            parameter.data = parameter.data.bfloat16().float()
    pairs = (pair for pair in solutions.items())
    difference, _, result = round_trip(tmp_path, model, pairs, dtype=torch.bfloat16, max_shard_bytes=4096)
    assert difference == 0.0
    folder = tmp_path / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 10
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 4096 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    assert result.bytes_total == sum(path.stat().st_size for path in folder.iterdir())
    assert result.files == tuple(sorted(path.name for path in folder.iterdir()))


def test_linear_bytes_are_four_and_a_half_bits_per_weight(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32))
    weights = sum(solution.codes.numel() for solution in solutions.values())
    result = export_compressed_tensors(model, None, solutions, tmp_path / "model")
    assert result.bytes_linear == weights * 4.5 / 8 + 16 * len(solutions)  # 16: weight_shape


def test_kept_columns_through_peft(tmp_path):
    """A different number of kept columns per site, none in some: base + adapter is the mixed model."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = small_llama()
    chosen = iter(range(100))

    def kept_of(name, columns):
        count = next(chosen) % 5
        return [(7 * step + count) % columns for step in range(count)]

    solutions = solve(model, lambda position: Grid(4, 32, position % 2 == 0), kept_of)
    wanted = logits_of(model)
    export_compressed_tensors(model, make_tokenizer(), solutions, tmp_path / "model")
    result = export_adapter(solutions, tmp_path / "adapter", "../model")
    base = load(tmp_path / "model")
    without = (logits_of(base) - wanted).abs().max()
    # The forward pass above unpacked the weights; peft cannot wrap packed ones.
    both = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        difference = (both(probe()).logits - wanted).abs().max()
    assert difference < 1e-5 * wanted.std()
    assert without > 0.1 * wanted.std()
    assert result.files == ("adapter_config.json", "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../model"
    assert len(config["target_modules"]) == sum(s.kept_index.numel() > 0 for s in solutions.values())
    scalings = [layer.scaling["default"] for layer in both.modules() if isinstance(layer, LoraLayer)]
    assert scalings == [1.0] * len(config["target_modules"])


def test_kept_columns_through_peft_on_dequantized_base(tmp_path):
    """`dequantize=True` unpacks while loading: another base that peft can wrap, equal in bfloat16."""
    from peft import PeftModel
    from transformers import CompressedTensorsConfig

    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [0, 9])
    export_compressed_tensors(model, None, solutions, tmp_path / "model")
    export_adapter(solutions, tmp_path / "adapter")
    packed = load(tmp_path / "model", torch.bfloat16)
    logits_of(packed)
    unpacked = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    first, second = (PeftModel.from_pretrained(base, tmp_path / "adapter").eval() for base in (packed, unpacked))
    assert torch.equal(logits_of(first), logits_of(second))
    assert (logits_of(second) - logits_of(model)).abs().max() < 0.2 * logits_of(model).std()


def test_the_printed_snippet_works(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [0, 9])
    export_compressed_tensors(model, make_tokenizer(), solutions, tmp_path / "model")
    export_adapter(solutions, tmp_path / "adapter")
    export_dense(model, make_tokenizer(), tmp_path / "dense")
    for lines in (
        snippet(str(tmp_path / "model"), str(tmp_path / "adapter")),
        snippet(str(tmp_path / "dense")),
    ):
        names: dict = {}
        exec(lines, names)
        assert (logits_of(names["model"].eval()) - logits_of(model)).abs().max() < 1e-4
        assert names["tokenizer"].encode("kept") == make_tokenizer().encode("kept")


def test_no_kept_columns_no_adapter(tmp_path):
    model = small_llama()
    assert export_adapter(solve(model, lambda position: Grid(4, 32)), tmp_path / "adapter") is None
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_export_loads_and_rounds_no_more_than_its_dtype(tmp_path, dtype):
    model = small_llama()
    solve(model, lambda position: Grid(4, 32), lambda name, columns: [1, 5])
    result = export_dense(model, make_tokenizer(), tmp_path / "dense", dtype=dtype, max_shard_bytes=20_000)
    loaded = load(tmp_path / "dense", "auto")
    assert loaded.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype))
    weights = sum(model.get_submodule(name).weight.numel() for name in site_names(model))
    assert result.bytes_linear == weights * dtype.itemsize


def test_four_bit_dense_export_is_exact_in_float16(tmp_path):
    """Code (3 bits and sign) times step (8 bits) fits the 11 bits of float16, not the 8 of bfloat16."""
    weight = values(rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), Grid(4, 32)))
    assert torch.equal(weight.half().float(), weight)
    assert not torch.equal(weight.bfloat16().float(), weight)


def test_dense_gpt2_and_mixtral(tmp_path):
    """Transposed linears and fused experts go through the dense export under their checkpoint names."""
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=304,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    ).eval()
    for name, model in (("gpt2", gpt2), ("mixtral", mixtral)):
        export_dense(model, None, tmp_path / name, max_shard_bytes=10_000)
        assert torch.equal(logits_of(load(tmp_path / name)), logits_of(model))
    names = json.loads((tmp_path / "mixtral/model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names


def test_config_generation_settings_and_tokenizer_come_along(tmp_path):
    model = small_llama()
    model.config.use_cache = False  # as a run leaves it
    # transformers' own save_pretrained refuses this pair (temperature without sampling), yet models ship it.
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=False, max_new_tokens=7)
    folder = tmp_path / "model"
    export_compressed_tensors(model, make_tokenizer(), solve(model, lambda position: Grid(4, 32)), folder)
    assert AutoTokenizer.from_pretrained(folder).encode("kept") == make_tokenizer().encode("kept")
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.use_cache
    assert config.quantization_config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert not hasattr(model.config, "quantization_config")  # the caller's model is left alone

"""Column steps fold into the layers before them, and the lattice becomes an int8 checkpoint for stock readers."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from geoquant import cli
from geoquant.errors import UserError
from geoquant.export.twin import int8_twin
from geoquant.lattice.unboxed import exponents, steps_of
from geoquant.methods.lattice import tied
from geoquant.methods.problem import LatticeSolution
from geoquant.model.folding import find_folds, scaled_parameters
from geoquant.model.walk import walk
from geoquant.pipeline import export, make_plan, quantize
from geoquant.plan import estimate
from geoquant.recipe import checked
from gguf_cases import bpe_tokenizer

PROBE = torch.arange(3, 11)[None]


def build(kind: str):
    """A tiny model of an architecture, with gains and biases that are not the ones and zeros of a fresh one."""
    import transformers as t

    sizes = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    if kind == "llama":
        model = tiny_llama()
    elif kind == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**sizes))
    elif kind == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, head_dim=8))
    elif kind == "gemma2":
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, head_dim=8, query_pre_attn_scalar=8))
    elif kind == "phi":  # attention and MLP read one LayerNorm; no gate
        model = t.PhiForCausalLM(t.PhiConfig(**sizes))
    elif kind == "olmo2":  # no norm before attention and MLP
        model = t.Olmo2ForCausalLM(t.Olmo2Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand_like(parameter) * (1 if name.endswith("weight") else 3))
    return model.eval()


def names(folds):
    return {stage.removeprefix("model.layers.0."): fold.module.removeprefix("model.layers.0.") for stage, fold in folds}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            kind,
            {
                "self_attn.q_proj": "input_layernorm",
                "self_attn.o_proj": "self_attn.v_proj",
                "mlp.gate_proj": norm,
                "mlp.down_proj": "mlp.up_proj",
            },
        )
        for kind, norm in (
            ("llama", "post_attention_layernorm"),
            ("qwen2", "post_attention_layernorm"),
            ("qwen3", "post_attention_layernorm"),
            ("gemma2", "pre_feedforward_layernorm"),
        )
    ]
    + [("phi", {"self_attn.q_proj": "input_layernorm", "self_attn.dense": "self_attn.v_proj"})]
    + [("olmo2", {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"})],
)
def test_folds_are_found_by_what_the_blocks_compute(kind, expected):
    model = build(kind)
    blocks = walk(model, PROBE)
    folds = find_folds(model, blocks, PROBE)
    first = [(stage, fold) for stage, fold in folds.items() if ".layers.0." in stage]
    assert names(first) == expected
    assert len(folds) == 2 * len(first)
    shared = {stage.rpartition(".")[2] for stage, fold in first if fold.shared}
    assert shared <= {"o_proj", "dense"}
    if "self_attn.o_proj" in expected:
        # Two heads share each value head: columns of heads 0 and 1 come from value head 0.
        index = folds["model.layers.0.self_attn.o_proj"].index.view(2, 2, 8)
        assert torch.equal(index, torch.arange(16).view(2, 1, 8).expand(2, 2, 8))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi"])
def test_a_fold_changes_nothing(kind):
    """Random scales moved by hand: weights of the stage divided, parameters of its fold multiplied."""
    model = build(kind)
    blocks = walk(model, PROBE)
    expected = model(PROBE).logits
    folded = copy.deepcopy(model)
    stages = {stage.name: stage for block in blocks for stage in block.stages}
    for name, fold in find_folds(model, blocks, PROBE).items():
        channels = torch.exp2(torch.randn(int(fold.index.max()) + 1))
        module = folded.get_submodule(fold.module)
        with torch.no_grad():
            for site in stages[name].sites:
                folded.get_submodule(site.name).weight.div_(channels[fold.index])
            for key, value in scaled_parameters(module, fold.module, channels).items():
                folded.get_parameter(key).copy_(value)
            if fold.linear:
                module.weight.mul_(channels[:, None])
        assert torch.equal(fold.channels(channels[fold.index]), channels)
        if fold.shared:
            assert fold.channels(torch.rand(len(fold.index))) is None
    torch.testing.assert_close(folded(PROBE).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_norm_that_others_read_too_is_no_place_for_steps():
    """Here the block adds the norm's output to its own: scaling the gain would change that."""
    model = build("llama")
    block = model.model.layers[0]
    kind = type(block.mlp)
    block.mlp.__class__ = type("Leaky", (kind,), {"forward": lambda self, x: kind.forward(self, x) + x})
    folds = find_folds(model, walk(model, PROBE), PROBE)
    assert "model.layers.0.mlp.gate_proj" not in folds
    assert "model.layers.1.mlp.gate_proj" in folds


def test_ties_keep_the_error_of_each_group():
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ties = torch.tensor([0, 1, 0, 1])
    found = tied(lengths, ties)
    assert torch.equal(found[:2], found[2:])
    # A step 1 / found costs as much error in each group as steps of their own.
    error = (lengths / found).square()
    torch.testing.assert_close(error.view(2, 2).sum(0), torch.tensor([2.0, 2.0]))
    assert tied(lengths, None) is lengths


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny model with shared value heads, and its recipe. Read only."""
    folder = tmp_path_factory.mktemp("twin")
    tiny_llama(intermediate_size=64).save_pretrained(folder / "model")
    bpe_tokenizer().save_pretrained(folder / "model")
    sizes = {"windows": 8, "window": 32, "evaluation_windows": 2, "formats": ("dense",), "verify": False}
    recipe = checked({"model": str(folder / "model"), "rate": 5.0, **sizes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
        quantize(recipe, folder / "run")
    return folder / "run", recipe


def test_stock_transformers_reads_the_int8_twin(run, tmp_path):
    """The integers of the lattice in the file, and the logits of the dense model of the same run."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    entry = export(folder, "compressed-tensors")
    assert entry["verified"]["ok"]
    assert entry["verified"]["max_rel"] < 1e-3  # float32: summation order only
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = torch.arange(24)[None]
    expected, found = dense(tokens).logits, twin(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    stored = load_file(folder / "model" / "model.safetensors")
    codes = load_file(folder / "sites" / "model.layers.1.mlp.down_proj.safetensors")["codes"].to(torch.int32)
    packed = stored["model.layers.1.mlp.down_proj.weight_packed"].view(torch.uint8).to(torch.int32) - 128
    assert torch.equal(packed, codes.clamp(-127, 127))
    # One step for both columns that come from one channel of the shared value head.
    steps = load_file(folder / "sites" / "model.layers.0.self_attn.o_proj.safetensors")["column_exponents"].view(
        2, 2, 8
    )
    assert torch.equal(steps[:, 0], steps[:, 1])


@pytest.mark.parametrize("to", ["gptq", "gguf"])
def test_other_int8_forms(run, tmp_path, to, monkeypatch):
    """GPTQ by its documented layout and GGUF through transformers: the dense weights with column steps folded, up to
    the rounding of scales to half precision, and the same logits.
    """
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    entry = export(folder, to, verify=False)
    assert entry["overflow_codes"] == 0
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    planned = make_plan(run[1].model_copy(update={"formats": (to,)}))
    assert planned["size"]["linear_bytes"] == entry["linear_bytes"]
    assert any(f"{to}: codes of the lattice do not fit" in warning for warning in planned["warnings"])
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    tokens = torch.arange(24)[None]
    expected = dense(tokens).logits
    if to == "gguf":
        found = AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    else:
        found, stored = copy.deepcopy(dense), load_file(folder / "gptq" / "model.safetensors")
        found.load_state_dict({key: value for key, value in stored.items() if "norm" in key}, strict=False)
        for name, module in found.named_modules():
            if f"{name}.qweight" in stored:
                words = stored[f"{name}.qweight"].view(torch.uint8).view(-1, module.out_features, 4)
                codes = words.transpose(1, 2).reshape(module.in_features, -1).float() - 128
                module.weight.data = (codes * stored[f"{name}.scales"].float()).T.contiguous()
    torch.testing.assert_close(found(tokens).logits, expected, rtol=1e-2, atol=1e-2 * expected.std().item())


def test_codes_beyond_int8_go_to_the_adapter(run, tmp_path):
    from peft import PeftModel

    source = tmp_path / "outlier"
    shutil.copytree(run[1].model, source)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    stored[name][1, 2] = 500 * stored[name].abs().max()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    changes = {"model": str(source), "rate": 6.0, "formats": ("dense", "compressed-tensors"), "verify": True}
    report = quantize(run[1].model_copy(update=changes), tmp_path / "run")
    dense, twin = report["exports"]
    assert twin["adapter_bytes"] > 0
    assert twin["overflow_codes"] >= 1
    assert dense["verified"]["ok"]
    assert twin["verified"]["ok"]
    tokens = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    model(tokens)
    with_adapter = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")(tokens).logits
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dense", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(with_adapter, expected, rtol=1e-2, atol=2e-3 * expected.std().item())


def test_steps_that_do_not_fold_are_refused(run, tmp_path, capsys):
    command = ["quantize", run[1].model, "--grid", "lattice", "--no-foldable", "--format", "compressed-tensors"]
    assert cli.run([*command, "--out", str(tmp_path / "run")]) == 2
    assert "leave --no-foldable out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_whose_steps_do_not_fold_is_refused_before_any_work(tmp_path, capsys):
    build("olmo2").save_pretrained(tmp_path / "model")
    bpe_tokenizer().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--grid", "lattice", "--format", "compressed-tensors"]
    sizes = ["--windows", "4", "--window", "16", "--evaluation-windows", "2"]
    assert cli.run([*command, *sizes, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "no layer before model.layers.0.self_attn.q_proj takes them" in told
    assert "geoquant, int4 or dense" in told
    assert not (tmp_path / "run").exists()


def test_folds_are_found_where_embeddings_have_columns_of_zeros():
    """As those of a quantized model may; what enters a block is of no concern."""
    model = build("llama")
    blocks = walk(model, PROBE)
    expected = find_folds(model, blocks, PROBE)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = 0.0
        model.get_input_embeddings().weight[0] = 0.0
    found = find_folds(model, blocks, PROBE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].index, fold.index) for name, fold in expected.items())


def test_a_stage_without_a_fold_is_named(run):
    model = AutoModelForCausalLM.from_pretrained(run[1].model)
    blocks = walk(model, PROBE)

    def solution(stage):
        columns = exponents(torch.rand(stage.columns) + 0.5)
        codes = torch.zeros(stage.rows, stage.columns, dtype=torch.int8)
        rows = exponents(torch.ones(stage.rows))
        return LatticeSolution(codes, rows, columns, 1.0, 0.01, steps_of(columns), torch.ones(2, stage.rows))

    stages = {stage.name: solution(stage) for block in blocks for stage in block.stages}
    with pytest.raises(UserError, match="o_proj cannot be folded"):  # steps differ where one channel makes two columns
        int8_twin(model, blocks, stages, find_folds(model, blocks, PROBE))
    with pytest.raises(UserError, match="q_proj cannot be folded"):
        int8_twin(model, blocks, stages, {})

"""The runtime form in a model: as a file (`export --to int4`), and in memory from entropy-coded files."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_tokenizer, tiny_llama
from geoquant import cli
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.export.int4 import PackedEmbedding, PackedLinear, PackedMatrix, footprint
from geoquant.export.packed import pack
from geoquant.export.reader import TiedHead
from geoquant.model.load import load
from geoquant.pipeline import export, quantize
from geoquant.plan import estimate
from geoquant.recipe import checked
from geoquant.results import StageFiles
from geoquant.runs import read_tensors, write_tensors


def quantized(place, tied):
    """A finished run; one weight is far out."""
    model = tiny_llama(tie_word_embeddings=tied)
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[1, 2] = 1000 * weight.abs().max()
    model.save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    (place / "calibration.txt").write_text(builtin_text()[:3000])
    (place / "evaluation.txt").write_text(builtin_text()[3000:4000])
    texts = {"calibration": str(place / "calibration.txt"), "evaluation": str(place / "evaluation.txt")}
    sizes = {"windows": 8, "window": 32, "evaluation_windows": 2, "compute": "float32", "target": "weights"} | texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
        quantize(checked({"model": str(place / "model"), "rate": 4.0, "verify": False, **sizes}), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its export, reloaded in a fresh process. Read only."""
    folder = quantized(tmp_path_factory.mktemp("int4"), tied=True)
    assert cli.run(["export", str(folder), "--to", "int4", "--json"]) == 0
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = quantized(tmp_path_factory.mktemp("int4"), tied=False)
    export(folder, "int4", verify=False)
    return folder


def in_memory(folder):
    """The entropy-coded file in the runtime form."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["runtime"] = "int4"
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


def solved(run, model):
    """Weights by site as the run has them."""
    from geoquant.model.vocabulary import vocabulary
    from geoquant.model.walk import walk

    blocks = walk(model, torch.arange(8)[None])
    blocks = (*blocks, vocabulary(model, len(blocks)))
    stages, found = StageFiles(run, blocks), {}
    for stage in (stage for block in blocks for stage in block.stages):
        weight = stages[stage.name].dequantize()
        parts = weight.split([site.shape[0] for site in stage.sites])
        found |= {site.name: part for site, part in zip(stage.sites, parts)}
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_both_ways_give_the_weights_of_the_run(tied, request):
    folder = request.getfixturevalue("run" if tied else "untied")
    truth = solved(folder, load(str(folder.parent / "model")).model)
    stored, made = AutoModelForCausalLM.from_pretrained(folder / "int4").eval(), in_memory(folder / "coded")
    coded = AutoModelForCausalLM.from_pretrained(folder / "coded").eval()
    tokens = torch.arange(3, 15)[None]
    for model in (stored, made):
        forms = {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
        assert forms.keys() == truth.keys()
        for name, weight in truth.items():
            assert torch.equal(forms[name].dequantize(), weight)
            assert torch.equal(coded.get_submodule(name).dequantize(), weight)
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        assert isinstance(model.get_output_embeddings(), TiedHead if tied else PackedLinear)
        torch.testing.assert_close(model(tokens).logits, coded(tokens).logits, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, coded(tokens).logits, rtol=1e-3, atol=1e-3)
        one, other = (some.generate(tokens, max_new_tokens=4, do_sample=False) for some in (model, coded))
        assert torch.equal(one, other)
        again = copy.deepcopy(model)
        assert torch.equal(again.generate(tokens, max_new_tokens=4, do_sample=False), one)


def test_the_report_tells_of_it(run):
    report = json.loads((run / "report.json").read_text())
    entry = next(entry for entry in report["exports"] if entry["format"] == "int4")
    assert entry["verified"]["ok"]
    found = footprint(AutoModelForCausalLM.from_pretrained(run / "int4"))
    assert found["weights"] == sum(site["shape"][0] * site["shape"][1] for site in report["sites"])
    assert found["beyond"] == entry["overflow_codes"] >= 1
    assert found["bytes"] == entry["linear_bytes"]
    assert found["width_4"] + found["width_8"] == found["weights"]
    assert "import geoquant" in entry["snippet"]


def test_geoquant_reads_its_own_file(run):
    loaded = load(str(run / "int4"), quantized=True)
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, PackedLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_codes_and_steps_alone(run, dtype):
    full = AutoModelForCausalLM.from_pretrained(run / "int4")
    for model in (AutoModelForCausalLM.from_pretrained(run / "int4", dtype=dtype), copy.deepcopy(full).to(dtype)):
        for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
            assert torch.equal(model.get_submodule(name).dequantize(), full.get_submodule(name).dequantize())
    model = AutoModelForCausalLM.from_pretrained(run / "int4", dtype=dtype)
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def damaged(folder, place, *, tensor=None, entry=None):
    shutil.copytree(folder / "int4", place)
    if tensor:
        stored = load_file(place / "model.safetensors")
        name = next(key for key in sorted(stored) if key.endswith(f".{tensor}") and stored[key].numel())
        stored[name].view(torch.uint8)[..., 0] ^= 4
        save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    if entry:
        config = json.loads((place / "config.json").read_text())
        next(iter(config["quantization_config"]["sites"].values())).update(entry)
        (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("tensor", ["dense", "pointers", "places", "excess", "row_steps", "column_steps"])
def test_a_flipped_bit_is_named(run, tmp_path, tensor):
    place = damaged(run, tmp_path / "broken", tensor=tensor)
    with pytest.raises(UserError, match=r"layer model\.\S+ of \S+broken is damaged: the checksum does not match; copy"):
        AutoModelForCausalLM.from_pretrained(place)


@pytest.mark.parametrize("entry", [{"width": 5}, {"excess": "float"}, {"shape": 3}, {"beyond": -1}, {"beyond": "x"}])
def test_a_damaged_entry_is_named(run, tmp_path, entry, capsys):
    place = damaged(run, tmp_path / "broken", entry=entry)
    assert cli.run(["eval", str(place), "--windows", "1", "--window", "32"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "broken is damaged: its entry in config.json says" in error
    assert "copy the checkpoint again" in error


def spoiled(folder, place, change):
    """A copy whose tensors `change` has changed."""
    shutil.copytree(folder, place)
    stored = load_file(place / "model.safetensors")
    change(stored)
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize(
    ("folder", "tensor"),
    [
        ("int4", "model.embed_tokens.dense"),
        ("int4", "model.layers.1.mlp.down_proj.row_steps"),
        ("int4", "model.layers.0.self_attn.q_proj.pointers"),
        ("coded", "model.embed_tokens.words"),
        ("coded", "model.layers.1.mlp.down_proj.row_classes"),
        ("coded", "model.layers.0.self_attn.q_proj.column_steps"),
        ("coded", "geoquant.tables"),
        ("coded", "geoquant.reaches"),
    ],
)
def test_a_tensor_that_is_lost_or_cut_or_of_another_kind_is_named(run, tmp_path, folder, tensor):
    def shorten(stored):
        stored[tensor] = stored[tensor].flatten()[:-1].clone()

    def convert(stored):
        stored[tensor] = stored[tensor].double()

    name = tensor.replace(".", r"\.")
    with pytest.raises(UserError, match=rf"^tensor {name} is missing from \S+lost; copy the checkpoint again$"):
        AutoModelForCausalLM.from_pretrained(
            spoiled(run / folder, tmp_path / "lost", lambda stored: stored.pop(tensor))
        )
    with pytest.raises(UserError, match=rf"^tensor {name} in \S+safetensors has shape \[\d+\]; wanted \[\d+.*; copy"):
        AutoModelForCausalLM.from_pretrained(spoiled(run / folder, tmp_path / "cut", shorten))
    with pytest.raises(
        UserError, match=rf"^tensor {name} in \S+safetensors has type F64; wanted torch\.u?int\d+; copy"
    ):
        AutoModelForCausalLM.from_pretrained(spoiled(run / folder, tmp_path / "other", convert))


@pytest.mark.parametrize("folder", ["int4", "coded"])
def test_files_that_do_not_fit_together_are_one_line(run, tmp_path, folder, capsys):
    shutil.copytree(run / folder, tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^weights file \S+model\.safetensors is truncated or damaged: .*; copy"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    shutil.copytree(run / folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    entry = sites.pop("model.embed_tokens")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"^config\.json of \S+other does not know tensor model\.embed_tokens\.\w+; copy"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    sites["model.nowhere"] = entry
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert cli.run(["eval", str(tmp_path / "other"), "--windows", "1", "--window", "32"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "other does not describe this model: LlamaModel has no attribute `nowhere`; copy the checkpoint" in error


def test_a_site_without_its_columns_is_named(run, tmp_path):
    shutil.copytree(run / "coded", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config["quantization_config"]["sites"]["model.layers.0.self_attn.k_proj"]["columns"] = "nowhere"
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"layer \S+k_proj of \S+ is damaged: its entry .* says nothing of 'nowhere'; copy"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


def damaged_config(folder, **changes):
    """The config of a folder with other entries in its `quantization_config`."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config |= changes
    return config


@pytest.mark.parametrize("columns", [["model.embed_tokens"], {}, None, 3])
def test_columns_of_another_type_are_one_line(columns, run):
    sites = json.loads((run / "coded" / "config.json").read_text())["quantization_config"]["sites"]
    sites["model.layers.0.self_attn.k_proj"]["columns"] = columns
    with pytest.raises(UserError, match=r"^layer \S+k_proj of \S+ is damaged: its entry in config.json says TypeError"):
        AutoModelForCausalLM.from_pretrained(run / "coded", config=damaged_config(run / "coded", sites=sites))


@pytest.mark.parametrize("folder", ["coded", "int4"])
@pytest.mark.parametrize(
    "tied",
    [
        *(None, 0, [], {}, ["lm_head"], 3),
        *({"lm_head": name} for name in ("model.layers.0.mlp.down_proj", "model.norm", "", None, ["x"])),
        {"lm_head": "model.embed_tokens", "model.norm": "model.embed_tokens"},
    ],
)
def test_ties_that_are_not_the_models_are_refused(tied, folder, run):
    """Some of them loaded, and computed something else."""
    with pytest.raises(UserError, match=r"^config\.json of \S+ does not describe this model: .*; copy the checkpoint"):
        AutoModelForCausalLM.from_pretrained(run / folder, config=damaged_config(run / folder, tied=tied))


def test_an_untied_head_cannot_be_tied(untied):
    config = damaged_config(untied / "int4", tied={"lm_head": "model.embed_tokens"})
    with pytest.raises(UserError, match=r'it ties \{"lm_head": "model.embed_tokens"\}, the model \{\}; copy'):
        AutoModelForCausalLM.from_pretrained(untied / "int4", config=config)


def test_steps_that_no_byte_holds_are_one_line_and_fit_into_the_formats_it_names(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("coded", "int4"))
    for path in (tmp_path / "run" / "sites").iterdir():
        tensors, metadata = read_tensors(path)
        tensors["row_exponents"][0] -= 300
        tensors["column_exponents"][0] += 300
        write_tensors(path, tensors, metadata)
    said = r"^the steps of \S+ differ too much .*; got a factor of 2\^[\d.]+; wanted less .*; use --format int4 or"
    with pytest.raises(UserError, match=said):
        export(tmp_path / "run", "geoquant", verify=False)
    models = []
    for name in ("int4", "dense"):
        entry = export(tmp_path / "run", name, verify=False)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / entry["path"]))
    packed, dense = models
    for name, weight in solved(tmp_path / "run", dense).items():
        if name != "lm_head":
            assert torch.equal(dense.get_submodule(name).weight, weight)
            assert torch.equal(packed.get_submodule(name).dequantize(), weight)


def test_an_unknown_runtime_is_one_line(run):
    config = AutoConfig.from_pretrained(run / "coded")
    config.quantization_config["runtime"] = "int3"
    with pytest.raises(UserError, match="unknown runtime 'int3'; wanted one of int4, int8; did you mean 'int"):
        AutoModelForCausalLM.from_pretrained(run / "coded", config=config)


def test_only_the_entropy_coded_file_needs_a_decoder(run, monkeypatch):
    for name in ("geoquant.export.native", "geoquant.export.coder", "geoquant.export.matrices"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "constriction", None)
    AutoModelForCausalLM.from_pretrained(run / "int4")
    with pytest.raises(UserError, match=r"decoding \S+coded needs the package 'constriction'; run: pip install"):
        AutoModelForCausalLM.from_pretrained(run / "coded")


def test_a_bias_is_added():
    codes, zeros = torch.tensor([[1, -9], [3, 100]]), torch.zeros(2, dtype=torch.int16)
    bias = torch.nn.Parameter(torch.tensor([0.5, -0.5]))
    layer = PackedLinear(pack(codes, zeros, zeros, width=4), bias.dtype, bias)
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[-16.5, 202.5]]
    assert "2 -> 2, 4 bits, 50.00% beyond" in repr(layer)


def test_a_box_does_not_go_into_it(tmp_path, tiny_model_dir):
    (tmp_path / "text.txt").write_text(builtin_text()[:3000])
    texts = dict.fromkeys(("calibration", "evaluation"), str(tmp_path / "text.txt"))
    recipe = checked({"model": str(tiny_model_dir), "group_size": 16, "formats": ("int4",), "window": 32, **texts})
    with pytest.raises(UserError, match="format int4 holds codes of the lattice; give quantize a --rate and nothing"):
        quantize(recipe, tmp_path / "run")


def test_a_run_can_write_it_itself_and_go_on(run, tmp_path):
    """Exporting again gives the same bytes."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "int4")
    export(tmp_path / "run", "int4", verify=False)
    name = "int4/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize(
    ("version", "words"), [("3", "names no version"), (None, "names no version"), (0, "names no version"), (2, "sizes")]
)
def test_a_version_that_does_not_fit_is_one_line(run, tmp_path, version, words):
    shutil.copytree(run / "int4", tmp_path / "int4")
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (tmp_path / "int4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int4")

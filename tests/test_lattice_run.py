"""`quantize --grid lattice` from end to end on a tiny model: the coded file, its reader, the rate, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from geoquant import cli, pipeline
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.export.reader import Coded, CodedEmbedding, CodedLinear
from geoquant.lattice.sphere import CUBE_DB
from geoquant.model.load import load
from geoquant.pipeline import quantize
from geoquant.plan import estimate
from geoquant.recipe import Recipe, checked
from geoquant.results import BABAI_ONLY

pytestmark = pytest.mark.usefixtures("constant_machine")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model_dir) -> Recipe:
    place = tmp_path_factory.mktemp("texts")
    (place / "calibration.txt").write_text(builtin_text()[:6000])
    (place / "evaluation.txt").write_text(builtin_text()[6000:8000])
    texts = {"calibration": str(place / "calibration.txt"), "evaluation": str(place / "evaluation.txt")}
    sizes = {"windows": 8, "window": 64, "evaluation_windows": 3, "gradient_share": 0.5, "compute": "float32"}
    return checked({"model": str(tiny_model_dir), "rate": 5.0, **texts, **sizes})


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished and verified run, and its report. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "lattice"
    return folder, quantize(recipe, folder)


def weights(model) -> dict[str, torch.Tensor]:
    return {
        name: (module.dequantize() if isinstance(module, Coded) else module.weight).float()
        for name, module in model.named_modules()
        if isinstance(module, Coded | torch.nn.Linear)
    }


def solved(folder) -> dict[str, torch.Tensor]:
    """Weights by site from the files in sites/, steps written out as powers of two."""
    found = {}
    for path in sorted((folder / "sites").glob("*.safetensors")):
        part = load_file(path)
        steps = [
            torch.exp2(part[f"{name}_exponents"].double() / 8).to(torch.bfloat16).double() for name in ("row", "column")
        ]
        weight = part["codes"].double() * steps[0][:, None] * steps[1]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            sites = json.loads(file.metadata()["sites"])
        for site, rows in zip(sites, weight.split([site["rows"] for site in sites])):
            found[site["name"]] = rows.float()
    return found


def test_a_rate_asks_for_the_lattice_its_method_and_its_format(recipe):
    assert (recipe.grid, recipe.method, recipe.formats) == ("lattice", "lattice-priced", ("geoquant",))
    assert checked({"model": "m"}).formats == ("geoquant",)
    assert checked({"model": "m", "grid": "lattice", "formats": ("dense",)}).formats == ("dense",)


def test_the_report_says_what_every_site_got(run):
    _, report = run
    size, sites = report["size"], report["sites"]
    # A tiny model's tables and steps weigh more than its codes' rounding to words: within three per cent.
    assert size["bits_per_weight"] == pytest.approx(5.0, rel=0.03)
    assert report["exports"][0]["verified"]["ok"]
    assert all(site["bits"] is None and site["clip_rate"] == 0.0 for site in sites)
    assert all(0 < site["error"] <= site["bound"] for site in sites)
    assert all(site["error"] == pytest.approx(site["expected_error"], rel=0.5) for site in sites)
    assert len({site["bits_per_weight"] for site in sites}) > 3
    for site in sites:
        # Steps at most a sixteenth of an octave off: lengths within 0.4 dB, so no basis has anything left to gain.
        # But for two columns that come from one channel of a value head and share its step.
        even = site["kind"] != "attention_out"
        assert 0 <= site["headroom_db"] < (0.03 if even else 1.0)
        assert all(abs(level) <= (0.7 if even else 15.0) for level in site["profile"]["steps"])
        assert site["profile"]["lengths"][0] > site["profile"]["steps"][0]
        assert site["gap_db"] == pytest.approx(CUBE_DB + site["headroom_db"] + site["rows_db"])
        assert site["rows_db"] == 0.0 if site["kind"] == "tied" else site["rows_db"] > 0.01  # tokens are strangers
        assert site["gap_db"] == pytest.approx(10 * math.log10(site["expected_error"] / site["sphere_bound"]))
    # What this adds to a report stays small.
    added = [{key: site[key] for key in BABAI_ONLY if key != "bound"} for site in sites]
    assert len(json.dumps(added, indent=1)) / len(sites) < 700


def test_transformers_reads_the_coded_file(run):
    """The very weights that were solved, int8 in memory, and the logits of the dense model they make."""
    folder, _ = run
    model = AutoModelForCausalLM.from_pretrained(folder / "coded").eval()
    truth = solved(folder)
    found = weights(model)
    assert truth.keys() <= found.keys()
    for name, weight in truth.items():
        module = model.get_submodule(name)
        assert module.codes.dtype == torch.int8
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0)
        if isinstance(module, CodedEmbedding):
            continue
        x = torch.randn(3, module.in_features)
        torch.testing.assert_close(module(x), torch.nn.functional.linear(x, weight, module.bias), rtol=1e-4, atol=1e-4)


def test_codes_beyond_a_byte_are_kept(recipe, tmp_path, tiny_model_dir):
    """A weight a thousand times the others costs a code of thousands and comes back exactly."""
    source = tmp_path / "outlier"
    shutil.copytree(tiny_model_dir, source)
    stored = load_file(source / "model.safetensors")
    name = next(key for key in stored if key.endswith("0.mlp.down_proj.weight"))
    stored[name][1, 2] = 1000 * stored[name].abs().max()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize(recipe.model_copy(update={"model": str(source), "rate": 6.0}), tmp_path / "run")
    site = next(site for site in report["sites"] if f"{site['name']}.weight" == name)
    assert site["largest_code"] > 127
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "coded")
    module = model.get_submodule(site["name"])
    assert len(module.overflow) >= 1
    truth = solved(tmp_path / "run")[site["name"]]
    torch.testing.assert_close(module.dequantize(), truth, rtol=1e-6, atol=0)
    x = torch.randn(2, module.in_features)
    expected = torch.nn.functional.linear(x, truth, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_geoquant_reads_its_own_file(run):
    folder, _ = run
    loaded = load(str(folder), quantized=True)
    for name, weight in solved(folder).items():
        torch.testing.assert_close(weights(loaded.model)[name], weight, rtol=1e-6, atol=0)


def test_the_snippet_runs_where_transformers_was_imported_first_or_last(run, tmp_path):
    folder, report = run
    snippet = report["exports"][0]["snippet"].replace(str(folder), str(folder.resolve()))
    for first in ("", "import transformers.quantizers.auto\n"):
        code = first + snippet + "print(type(model.model.layers[0].mlp.down_proj).__name__)\n"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert child.stdout.strip() == "CodedLinear", child.stderr


@pytest.mark.parametrize("tensor", ["words", "row_steps", "row_classes", "column_steps", "column_classes"])
def test_a_flipped_bit_is_named(run, tmp_path, tensor):
    folder, _ = run
    shutil.copytree(folder / "coded", tmp_path / "coded")
    path = tmp_path / "coded" / "model.safetensors"
    stored = load_file(path)
    name = next(key for key in sorted(stored) if key.endswith(f".{tensor}") and stored[key].numel())
    stored[name].view(torch.uint8)[3] ^= 4
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer model\.\S+ of \S+coded is damaged: the checksum does not match"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


def test_a_later_version_is_refused(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "coded", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="upgrade"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


def test_an_interrupted_run_goes_on_to_the_same_bits(run, recipe, tmp_path, monkeypatch):
    folder, _ = run
    calls = []

    def stop(path, result, plans):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(result.stage.name)
        return save(path, result, plans)

    save = pipeline.save_stage
    monkeypatch.setattr(pipeline, "save_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "again")
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    quantize(recipe, tmp_path / "again", resume=True)
    for path in sorted((folder / "sites").glob("*.safetensors")):
        one, other = load_file(path), load_file(tmp_path / "again" / "sites" / path.name)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


def test_a_lost_site_is_solved_again_to_the_same_bits(run, recipe, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    for path in sorted((tmp_path / "run" / "sites").glob("*.safetensors"))[1:5:3]:
        path.unlink()
    quantize(recipe, tmp_path / "run", resume=True)
    for path in sorted((folder / "sites").glob("*.safetensors")):
        one, other = load_file(path), load_file(tmp_path / "run" / "sites" / path.name)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


def changed(source, folder, **changes):
    """A copy of a model's folder with some weights changed by functions of them."""
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        key = next(key for key in sorted(stored) if key.endswith(name.replace("__", ".") + ".weight"))
        stored[key] = change(stored[key].clone()).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def half_dead(weight):
    weight[:, : weight.shape[1] // 2] = 0
    return weight


@pytest.mark.parametrize(
    "changes",
    [
        {"layers__0__self_attn__o_proj": half_dead},  # half of the heads reach nobody
        {"layers__0__mlp__down_proj": torch.zeros_like},  # gate and up reach nobody
        {"layers__1__self_attn__v_proj": torch.zeros_like},  # the input of o_proj is zero
    ],
)
def test_what_influences_nothing_stays_finite_and_cheap(changes, recipe, tmp_path, tiny_model_dir):
    """In half precision too, which holds nothing beyond 65504."""
    model = changed(tiny_model_dir, tmp_path / "model", **changes)
    report = quantize(recipe.model_copy(update={"model": model}), tmp_path / "run")
    assert all(site["error"] is not None and site["error"] == site["error"] for site in report["sites"])
    assert max(site["bits_per_weight"] for site in report["sites"]) < 12
    tokens = torch.arange(12)[None]
    for dtype in (torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "coded", dtype=dtype)
        assert loaded(tokens).logits.isfinite().all()


def test_autocast_and_overflow_agree(recipe, tmp_path, tiny_model_dir):
    def outlier(weight):
        weight[1, 2] = 1000 * weight.abs().max()
        return weight

    model = changed(tiny_model_dir, tmp_path / "model", layers__0__mlp__down_proj=outlier)
    quantize(recipe.model_copy(update={"model": model, "verify": False}), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "coded")
    assert any(len(module.overflow) for module in loaded.modules() if isinstance(module, CodedLinear))
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(torch.arange(12)[None]).logits.isfinite().all()


def test_a_rate_that_cannot_be_met_is_told(recipe, tmp_path):
    report = quantize(recipe.model_copy(update={"rate": 1.5, "verify": False}), tmp_path / "run")
    assert any("asked for 1.5 bits per weight, got" in warning for warning in report["warnings"])


def test_changed_bases_are_noticed(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "coded", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    next(iter(config["quantization_config"]["sites"].values()))["bases"][0] += 8
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


@pytest.mark.parametrize("method", ["lattice-priced-descent", "lattice-descent", "lattice-rtn"])
def test_an_experiment_of_the_lattice_is_a_run_like_any_other(method, recipe, run, tmp_path):
    """The rate is met from what its codes really cost; where bits have a price, or weights are alone, nothing bounds an
    error."""
    rows = 1 if method == "lattice-rtn" else recipe.row_block
    changes = {"method": method, "verify": False, "row_block": rows}
    report = quantize(recipe.model_copy(update=changes), tmp_path / "run")
    assert report["size"]["bits_per_weight"] == pytest.approx(5.0, rel=0.03)
    assert {site["method"] for site in report["sites"]} == {method}
    assert {site["bound"] is None for site in report["sites"]} == {"priced" in method or rows == 1}
    assert {site["order"] == "none" for site in report["sites"]} == {rows == 1}
    plain, found = solved(run[0]), solved(tmp_path / "run")
    assert any(not torch.equal(found[name], plain[name]) for name in found)


def test_gpt2_is_refused_before_anything_runs(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    from conftest import make_tokenizer

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 304}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    command = ["quantize", str(tmp_path / "gpt2"), "--rate", "4", "--windows", "4", "--window", "32"]
    assert cli.run([*command, "--out", str(tmp_path / "run")]) == 2
    assert "use --format dense" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0.1"], "a rate belongs to the lattice"),
        (["--metric", "plain"], "gradients"),
        (["--method", "rtn"], "needs a box"),
        (["--method", "lattice-kbest"], "solves every row by itself"),
        (["--method", "lattice-priced", "--grid", "box"], "has bits"),
        (["--format", "compressed-tensors", "--grid", "lattice", "--no-foldable"], "fold away"),
        (["--grid", "box"], "a box has bits"),
        (["--bits", "4"], "a rate belongs to the lattice"),
        (["--group-size", "32", "--grid", "lattice"], "group_size belongs to the box"),
    ],
)
def test_what_the_lattice_cannot_do_is_one_line(flags, words, recipe, tmp_path, capsys):
    command = ["quantize", recipe.model, "--rate", "3", *flags, "--out", str(tmp_path / "run")]
    assert cli.run(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (tmp_path / "run").exists()


def test_a_box_does_not_go_into_the_coded_format(recipe, tmp_path):
    with pytest.raises(UserError, match="codes of the lattice"):
        quantize(checked({"model": recipe.model, "group_size": 16, "formats": ("geoquant",)}), tmp_path / "run")


def test_a_rate_has_limits():
    for rate in (1.4, 8.5):
        with pytest.raises(UserError, match=r"at least 1.5 and at most 8"):
            checked({"model": "m", "rate": rate})

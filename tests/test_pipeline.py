"""`quantize` from end to end on tiny models: what is on disk, what the report says of it, and what is refused.

The truth is recomputed here from the run's files and the original model: weights from codes and steps, errors from
moments accumulated with forward hooks, file sizes from the files.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tokenizer, tiny_llama
from geoquant import auditing, cli, examine, exporting, pipeline
from geoquant.data.private import make_records
from geoquant.data.records import write_records
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.export.verify import TOLERANCE
from geoquant.model.halves import widened
from geoquant.pipeline import make_plan, quantize
from geoquant.recipe import Recipe
from geoquant.report.schema import check_schema

CASES = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits": {},
    "8 bits": {"bits": 8},
    "asymmetric": {"symmetric": False},
    "rtn": {"method": "rtn", "metric": "plain"},
    "full-precision inputs": {"metric": "plain", "sequential": "off", "order": "natural", "damping": 0.02},
    "outputs": {"bits": 3, "target": "outputs"},
    "uneven groups": {"group_size": 32, "metric": "clipped", "sequential": "block", "order": "min-pivot"},
    "dense": {"bits": 5, "formats": ("dense",), "static_scales": True, "keep": 0.05},
}
WINDOWS, WINDOW = 8, 64


pytestmark = pytest.mark.usefixtures("constant_machine")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_dir):
    """A folder with calibration and evaluation texts and the recipe that every case starts from."""
    place = tmp_path_factory.mktemp("runs")
    text = builtin_text()
    (place / "calibration.txt").write_text(text[:6000])
    (place / "evaluation.txt").write_text(text[6000:8000])
    return place, Recipe(
        model=str(tiny_model_dir),
        calibration=str(place / "calibration.txt"),
        evaluation=str(place / "evaluation.txt"),
        windows=WINDOWS,
        window=WINDOW,
        evaluation_windows=3,
        group_size=16,
        verify=False,
        compute="float32",  # the hand calculations below are exact; what bfloat16 costs is tested elsewhere
        gradient_share=1.0,
        target="weights",  # and here the targets are known without a solve
    )


@pytest.fixture(scope="module")
def run_of(workplace):
    """The report and the folder of a case, played once for all tests. Read only."""
    place, recipe = workplace
    played: dict[str, tuple[dict, Path]] = {}

    def play(name: str) -> tuple[dict, Path]:
        if name not in played:
            folder = place / name.replace(" ", "-")
            played[name] = quantize(recipe.model_copy(update=CASES[name]), folder), folder
        return played[name]

    return play


def test_an_original_that_is_worse_than_guessing_is_doubted(workplace, run_of, tmp_path):
    _, recipe = workplace
    sane = run_of(next(iter(CASES)))[0]
    assert not any("worse than guessing" in warning for warning in sane["warnings"])
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    model.lm_head.weight.data.mul_(200)
    model.save_pretrained(tmp_path / "loud")
    make_tokenizer().save_pretrained(tmp_path / "loud")
    report = quantize(recipe.model_copy(update={"model": str(tmp_path / "loud"), "formats": ()}), tmp_path / "run")
    assert any("worse than guessing" in warning for warning in report["warnings"])


def tokens_of(path: Path, start: int = 0, count: int = WINDOWS) -> torch.Tensor:
    """Windows by the protocol, with the byte tokenizer's numbering written out: one token a byte, no BOS."""
    ids = make_tokenizer()(path.read_text(), add_special_tokens=False).input_ids
    return torch.tensor(ids[start : start + count * WINDOW]).view(count, WINDOW)


def decoded(run: Path) -> dict[str, torch.Tensor]:
    """Weights by site from the files in sites/: `s (z - zero)` column by column, kept columns in their places."""
    from safetensors import safe_open

    found = {}
    for path in sorted((run / "sites").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sites, (_, group, _) = json.loads(file.metadata()["sites"]), json.loads(file.metadata()["grid"])
        columns = part["codes"].shape[1]
        weight = torch.stack(
            [
                (
                    part["codes"][:, column].double()
                    - (part["zero_points"][:, column // group].double() if "zero_points" in part else 0.0)
                )
                * part["scales"][:, column // group].double()
                for column in range(columns)
            ],
            dim=1,
        )
        weight[:, part["kept_index"]] = part["kept_weight"].double()
        start = 0
        for site in sites:
            found[site["name"]] = weight[start : start + site["rows"]]
            start += site["rows"]
    return found


def with_weights(model, weights: dict[str, torch.Tensor]):
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        linear.weight.data = weight.to(linear.weight.dtype).reshape(linear.weight.shape)
    return model


@torch.no_grad()
def inputs_of(model, site: str, tokens: torch.Tensor) -> torch.Tensor:
    """What reaches a site, in float64: (windows, length, columns)."""
    seen = []
    handle = model.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    model(tokens)
    handle.remove()
    return torch.cat(seen)


# --- what is on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_report_keeps_its_contract(case, run_of, tiny_model):
    report, run = run_of(case)
    check_schema(report)
    assert json.loads((run / "report.json").read_text()) == report
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "model.layers.<wbr>" in page or "model.<wbr>layers" in page
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    assert not list(run.rglob(".partial-*"))
    assert datetime.fromisoformat(report["created"]).tzinfo is not None
    names = [name for name, module in tiny_model.named_modules() if type(module) is torch.nn.Linear]
    sites = {site["name"]: site for site in report["sites"]}
    assert list(sites) == names[: len(sites)]
    assert len(sites) == 14  # seven linear maps in each of two blocks, not the tied head
    for name, site in sites.items():
        assert site["shape"] == list(tiny_model.get_submodule(name).weight.shape)
        assert site["block"] == int(name.split(".")[2])
        assert site["bits"] == report["recipe"]["bits"]
        assert 0 <= site["clip_rate"] < 0.5
        assert len(site["kept_columns"]) == site["kept"]
    assert report["model"]["parameters"] == sum(p.numel() for p in tiny_model.parameters())
    for state in ("original", "quantized"):
        quality = report["quality"][state]
        assert quality["perplexity"] == pytest.approx(math.exp(quality["nll"]))
        assert quality["tokens"] == 3 * (WINDOW - 1)
    change = report["quality"]["quantized"]["nll"] - report["quality"]["original"]["nll"]
    assert report["quality"]["delta_nll"]["value"] == pytest.approx(change, abs=1e-9)
    assert {"load", "quantize", "export", "observe (CPU)", "solve (CPU)"} <= set(report["timings"])
    assert report["privacy"] is None


@pytest.mark.parametrize("case", CASES)
def test_the_solved_model_is_what_the_site_files_say(case, run_of, tiny_model):
    _, run = run_of(case)
    stored = load_file(run / "expected.safetensors")
    with torch.no_grad():
        logits = with_weights(tiny_model, decoded(run))(stored["tokens"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_reads_what_was_solved(case, run_of):
    report, run = run_of(case)
    (export,) = report["exports"]
    model = AutoModelForCausalLM.from_pretrained(run / export["path"], dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(run / export["path"])("ab").input_ids == make_tokenizer()("ab").input_ids
    assert model.config.use_cache is True  # a run's own switch must not travel
    stored = load_file(run / "expected.safetensors")
    with torch.no_grad():
        logits = model(stored["tokens"]).logits
    spread = stored["logits"].std()
    assert (logits - stored["logits"]).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_the_files_and_of_the_plan(case, run_of, workplace):
    report, run = run_of(case)
    size, (export,) = report["size"], report["exports"]
    tensors = load_file(run / export["path"] / "model.safetensors")
    linear = sum(tensor.nbytes for name, tensor in tensors.items() if "_proj." in name)
    assert size["linear_bytes"] == linear
    assert size["total_bytes"] == sum(path.stat().st_size for path in (run / export["path"]).iterdir())
    weights = sum(math.prod(site["shape"]) for site in report["sites"])
    assert size["file_bits_per_weight"] == pytest.approx(8 * linear / weights)
    assert size["kept_bytes"] == 0
    planned = make_plan(workplace[1].model_copy(update=CASES[case]))
    # Sites are tiny here: the 16 bytes in which each packed one notes its shape count.
    assert planned["size"]["linear_bytes"] == pytest.approx(linear, rel=0.06)
    everything = sum(tensor.nbytes for tensor in tensors.values())
    assert planned["size"]["total_bytes"] == pytest.approx(everything, rel=0.03)
    assert planned["size"]["original_bytes"] == size["original_bytes"]
    assert planned["size"]["bits_per_weight"] == size["bits_per_weight"]
    assert planned["warnings"] == report["warnings"]
    assert [(s["name"], s["method"], s["bits_per_weight"]) for s in planned["sites"]] == [
        (s["name"], s["method"], s["bits_per_weight"]) for s in report["sites"]
    ]


def test_more_bits_cost_more_and_err_less(run_of):
    runs = [run_of(case)[0] for case in ("2 bits", "3 bits", "4 bits", "8 bits")]
    for fewer, more in itertools.pairwise(runs):
        assert more["size"]["bits_per_weight"] > fewer["size"]["bits_per_weight"]
        errors = [sum(site["error"] for site in run["sites"]) for run in (fewer, more)]
        assert errors[1] < errors[0] / 2
        assert more["quality"]["kl"]["value"] < fewer["quality"]["kl"]["value"]
    # 2^(8-4) times finer steps, whose squares count.
    ratio = runs[2]["sites"][0]["error"] / runs[3]["sites"][0]["error"]
    assert 100 < ratio < 700


# --- the certificate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_certificates_hold(case, run_of):
    for site in run_of(case)[0]["sites"]:
        assert site["error"] > 0
        assert site["expected_error"] > 0
        if site["method"] == "rtn":
            assert site["bound"] is None
            continue
        assert site["bound"] == pytest.approx(3 * site["expected_error"])
        if site["clip_rate"] == 0:  # rare for a whole site; below, row by row
            assert site["error"] <= site["bound"] * (1 + 1e-5), site["name"]
        assert 0.2 < site["error"] / site["expected_error"] < 3, site["name"]


@pytest.mark.parametrize(
    ("case", "site"),
    [
        ("full-precision inputs", "model.layers.1.mlp.down_proj"),
        ("full-precision inputs", "model.layers.0.self_attn.k_proj"),
        ("4 bits", "model.layers.1.mlp.up_proj"),
        ("2 bits", "model.layers.1.self_attn.o_proj"),
        ("rtn", "model.layers.0.mlp.down_proj"),
    ],
)
def test_errors_agree_with_moments_accumulated_by_hand(case, site, run_of, workplace, tiny_model):
    report, run = run_of(case)
    entry = next(s for s in report["sites"] if s["name"] == site)
    weights, original = decoded(run), tiny_model.get_submodule(site).weight.detach().double()
    names = [s["name"] for s in report["sites"]]
    if report["recipe"]["sequential"] == "site":
        # Run-time inputs: everything before this site's stage is quantized, its own stage is not.
        stage = stage_of(run, site)
        done = names[: names.index(stage[0])]
        with_weights(tiny_model, {name: weights[name] for name in done})
    x = inputs_of(tiny_model, site, tokens_of(workplace[0] / "calibration.txt"))
    if report["recipe"]["metric"] == "gradient":
        energies = load_file(run / "token_weights.safetensors")
        x = x * energies[f"tokens/{stage_of(run, site)[0]}"].double().sqrt()[..., None]
    difference = weights[site] - original

    def relative(part: torch.Tensor) -> float:
        return ((part @ difference.T).square().sum() / (part @ original.T).square().sum()).item()

    assert entry["error"] == pytest.approx(relative(x), rel=2e-3)
    # One window in eight is held out.
    assert entry["heldout_error"] == pytest.approx(relative(x[-1:]), rel=2e-3)
    if report["recipe"]["method"] == "rtn":
        return
    # Whatever the order, the squared lengths multiply to the determinant of the damped metric.
    moments = torch.einsum("wti,wtj->ij", x, x)
    damped = moments + entry["damping"] * moments.diagonal().mean() * torch.eye(len(moments))
    stage = stage_of(run, site)
    stored = load_file(run / "sites" / f"{stage[0]}.safetensors")
    lengths = stored["gram_schmidt"].double()
    assert 2 * lengths.log().sum().item() == pytest.approx(torch.linalg.slogdet(damped)[1].item(), abs=0.02)
    shapes = {s["name"]: s["shape"] for s in report["sites"]}
    start = sum(shapes[name][0] for name in stage[: stage.index(site)])
    rows = slice(start, start + len(original))
    steps = stored["scales"][rows].double().repeat_interleave(report["recipe"]["group_size"], dim=1)
    limits = (steps[:, : len(lengths)].square() * lengths.square()).sum(1)
    energy = (x.flatten(0, 1) @ original.T).square().sum()
    assert entry["expected_error"] == pytest.approx((limits.sum() / 12 / energy).item(), rel=2e-3)
    # The bound row by row, where the box touched nothing.
    free = stored["saturated"][rows] == 0
    assert entry["clip_rate"] == pytest.approx(stored["saturated"][rows].mean().item(), abs=1e-7)
    errors = ((difference @ damped) * difference).sum(1)
    assert free.any()
    assert (errors[free] <= limits[free] / 4 * (1 + 1e-3)).all()


def stage_of(run: Path, site: str) -> list[str]:
    """The sites that share a site's input, from the file that holds it."""
    from safetensors import safe_open

    for path in (run / "sites").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = [entry["name"] for entry in json.loads(file.metadata()["sites"])]
        if site in names:
            return names
    raise AssertionError(f"{site} is in no file of {run}")


# --- other models -------------------------------------------------------------------------------------------


def test_gpt2_goes_to_dense_and_is_refused_as_packed_before_anything_runs(workplace, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    _, recipe = workplace
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
    original = GPT2LMHeadModel(config).eval()
    original.save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    wanted = recipe.model_copy(update={"model": str(tmp_path / "gpt2")})
    with pytest.raises(UserError, match=r"Conv1D.*choose --format dense") as caught:
        quantize(wanted, tmp_path / "refused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()

    run = tmp_path / "run"
    report = quantize(wanted.model_copy(update={"formats": ("dense",)}), run)
    check_schema(report)
    assert len(report["sites"]) == 8
    # Conv1D stores its weight transposed; the report and the files in sites/ speak of (out, in).
    assert {tuple(s["shape"]) for s in report["sites"]} == {(96, 32), (32, 32), (128, 32), (32, 128)}
    weights = {name: weight.T for name, weight in decoded(run).items()}
    stored = load_file(run / "expected.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(run / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(dense(stored["tokens"]).logits, stored["logits"], atol=1e-5, rtol=1e-5)
        mine = with_weights(original, weights)(stored["tokens"]).logits
    torch.testing.assert_close(mine, stored["logits"], atol=2e-4, rtol=1e-4)


def test_a_bfloat16_model_stays_one(workplace, tmp_path):
    _, recipe = workplace
    model = tiny_llama(seed=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    make_tokenizer().save_pretrained(tmp_path / "bf16")
    run = tmp_path / "run"
    report = quantize(recipe.model_copy(update={"model": str(tmp_path / "bf16"), "bits": 8}), run)
    check_schema(report)
    assert report["model"]["dtype"] == "bfloat16"
    assert report["size"]["original_bytes"] == 2 * report["model"]["parameters"]
    tensors = load_file(run / "model" / "model.safetensors")
    assert {t.dtype for n, t in tensors.items() if "_proj" not in n} == {torch.bfloat16}
    stored = load_file(run / "expected.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        with widened(loaded.device):
            logits = loaded(stored["tokens"]).logits.float()
        wide = with_weights(tiny_llama(seed=4).to(torch.bfloat16).float(), decoded(run))(stored["tokens"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=0.0, rtol=0.0)
    assert (wide - stored["logits"]).abs().max() < TOLERANCE["bfloat16"] * wide.std()  # what verify grants
    # At 8 bits what is left is noise of the arithmetic.
    assert abs(report["quality"]["delta_nll"]["value"]) < 0.02


# --- kept columns, a real reload, and the commands that read a finished run ---------------------------------


@pytest.fixture(scope="module")
def kept_run(workplace):
    """A run with kept columns, quantized from the command line and verified by stock transformers and PEFT."""
    place, recipe = workplace
    folder = place / "kept"
    flags = ["--keep", "0.05", "--method", "dqc", "--windows", "8", "--window", "64", "--group-size", "16"]
    texts = ["--calibration", recipe.calibration, "--text", recipe.evaluation, "--evaluation-windows", "3"]
    assert cli.run(["quantize", recipe.model, "--out", str(folder), *flags, *texts, "--bits", "3"]) == 0
    return json.loads((folder / "report.json").read_text()), folder


def test_kept_columns_reach_stock_peft_in_a_process_without_geoquant(kept_run, tiny_model):
    report, run = kept_run
    check_schema(report)
    (export,) = report["exports"]
    assert export["verified"]["ok"] is True
    assert export["verified"]["max_rel"] < 1e-4
    assert {"transformers", "peft", "compressed-tensors"} <= set(export["verified"]["readers"])
    for site in report["sites"]:
        assert site["kept"] == math.ceil(0.05 * site["shape"][1])
        assert site["bound"] == pytest.approx(3 * site["expected_error"])
        assert "would cost" in site["reason"]
    weights = decoded(run)
    stored = load_file(run / "expected.safetensors")
    with torch.no_grad():
        logits = with_weights(tiny_model, weights)(stored["tokens"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=2e-4, rtol=1e-4)
    # In the checkpoint the kept columns are zero, in the adapter they are themselves.
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for site in report["sites"]:
        name = f"base_model.model.{site['name']}"
        selected = adapter[f"{name}.lora_A.weight"].float().argmax(1).tolist()
        assert sorted(site["kept_columns"]) == selected
        held = adapter[f"{name}.lora_B.weight"].double()
        assert torch.equal(held, weights[site["name"]][:, selected])
    assert report["size"]["kept_bytes"] == sum(path.stat().st_size for path in (run / "adapter").iterdir())
    assert report["size"]["total_bytes"] == sum(
        path.stat().st_size for folder in ("model", "adapter") for path in (run / folder).iterdir()
    )


def test_a_finished_run_exports_to_dense_with_the_same_logits(kept_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(kept_run[1], run)
    assert cli.run(["export", str(run), "--to", "dense", "--no-verify", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["format"] == "dense"
    dense = AutoModelForCausalLM.from_pretrained(run / "dense", dtype=torch.float32).eval()
    stored = load_file(run / "expected.safetensors")
    with torch.no_grad():
        assert torch.equal(dense(stored["tokens"]).logits, stored["logits"])
    report = json.loads((run / "report.json").read_text())
    check_schema(report)
    assert [export["format"] for export in report["exports"]] == ["compressed-tensors", "dense"]
    # Once more replaces the entry instead of adding one.
    assert cli.run(["export", str(run), "--to", "dense", "--no-verify"]) == 0
    assert [e["format"] for e in json.loads((run / "report.json").read_text())["exports"]] == [
        "compressed-tensors",
        "dense",
    ]


def test_an_export_from_a_run_whose_model_changed_is_refused(kept_run, workplace, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(kept_run[1], run)
    other = tmp_path / "model"
    tiny_llama(seed=9).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["model"] = str(other)
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(["export", str(run), "--to", "dense", "--no-verify"]) == 2
    assert "is not the model that" in capsys.readouterr().err
    assert not (run / "dense").exists()


def test_verify_explain_and_compare_read_a_real_run(kept_run, run_of, capsys):
    report, run = kept_run
    capsys.readouterr()
    assert cli.run(["verify", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert [Path(export["path"]).name for export in shown["exports"]] == ["model"]

    assert cli.run(["explain", str(run)]) == 0
    table = capsys.readouterr().out
    assert all(site["name"] in table for site in report["sites"])
    assert cli.run(["explain", str(run), "1.mlp.down_proj"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("model.layers.1.mlp.down_proj")
    assert "3 columns at 16 bits" in told

    assert cli.run(["compare", str(run), str(run_of("4 bits")[1]), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["recipe"]["bits"] for row in rows] == [3, 4]
    assert cli.run(["compare", str(run), str(run_of("4 bits")[1])]) == 0
    assert "tiny-llama" in capsys.readouterr().out


def test_an_export_that_reads_differently_is_not_called_done(workplace, tmp_path, monkeypatch):
    from geoquant.export.verify import VerifyResult

    found = VerifyResult(1.0, 0.5, 0.1, 1e-3, False, True, {"torch": "2"}, 0.1)
    monkeypatch.setattr(exporting, "verify", lambda *_: found)
    recipe = workplace[1].model_copy(update={"verify": True, "metric": "plain", "method": "rtn"})
    with pytest.raises(UserError, match="does not reproduce the solved model") as caught:
        quantize(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "running"
    # Hours of work are told of all the same.
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    check_schema(report)
    assert report["warnings"] == [str(caught.value)]
    (export,) = report["exports"]
    assert (export["verified"]["ok"], export["verified"]["max_abs_diff"]) == (False, 1.0)
    assert "Verification failed" in (tmp_path / "run" / "report.html").read_text()


def test_an_export_that_cannot_be_read_is_told_of_until_it_can(kept_run, tmp_path, monkeypatch, capsys):
    from geoquant.export.verify import VerifyResult

    def unreadable(*_):
        raise UserError("stock readers cannot load it", fix="readers: torch 2")

    run = tmp_path / "copy"
    shutil.copytree(kept_run[1], run)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "verify", unreadable)
        assert cli.run(["export", str(run), "--to", "dense"]) == 2
    assert "geoquant: error: stock readers cannot load it; readers: torch 2" in capsys.readouterr().err
    report = json.loads((run / "report.json").read_text())
    check_schema(report)
    assert report["exports"][1]["verified"]["ok"] is False
    assert report["warnings"] == [*kept_run[0]["warnings"], "stock readers cannot load it; readers: torch 2"]
    assert "Stock readers could not load it." in (run / "report.html").read_text()
    good = VerifyResult(0.0, 0.0, 0.0, 1e-3, True, True, {"torch": "2"}, 0.1)
    monkeypatch.setattr(exporting, "verify", lambda *_: good)
    assert cli.run(["export", str(run), "--to", "dense"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["exports"][1]["verified"]["ok"] is True
    assert report["warnings"] == kept_run[0]["warnings"]


# --- private records ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(workplace):
    """Flags of an audit: twelve members, ten others, and the untouched model as public base."""
    place, recipe = workplace
    pool = make_records(22, seed=5)
    write_records(place / "members.jsonl", pool[:12])
    write_records(place / "others.jsonl", pool[12:])
    return {
        "members": str(place / "members.jsonl"),
        "nonmembers": str(place / "others.jsonl"),
        "reference": recipe.model,
    }


def test_a_run_with_records_audits_base_original_and_quantized(workplace, records, tmp_path, monkeypatch):
    _, recipe = workplace
    wanted = recipe.model_copy(update=records | {"metric": "plain", "method": "rtn"})
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "score_reference", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(wanted, tmp_path / "run")
    assert calls
    # The base is read before anything of the run proper: that must not make the folder unusable.
    report = quantize(wanted, tmp_path / "run", resume=True)
    check_schema(report)
    assert {attack["subject"] for attack in report["privacy"]["attacks"]} == {"base", "original", "quantized"}
    found = {(a["name"], a["subject"]): a["auc"] for a in report["privacy"]["attacks"]}
    # The base here is the original itself.
    assert found["loss", "base"] == found["loss", "original"]
    assert report["privacy"]["n_members"] == 12
    assert report["hashes"].keys() == {"model", "calibration", "evaluation", "records", "reference"}
    assert report["hashes"]["reference"] == report["hashes"]["model"]


@pytest.mark.parametrize("stage", ["options", "reference"])
def test_an_audited_run_that_is_refused_leaves_nothing(stage, workplace, records, tmp_path):
    changes = {"group_size": 33} if stage == "options" else {"reference": str(tmp_path / "nowhere")}
    recipe = workplace[1].model_copy(update=records | changes)
    with pytest.raises(UserError):
        quantize(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- bad input ----------------------------------------------------------------------------------------------


def damaged_model(folder: Path, source: str) -> None:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mistake(name: str, model: str, place: Path, records: dict[str, str]) -> list[str]:
    """Arguments of `quantize` with one thing wrong; files it needs are written to `place`."""
    audit = ["--members", records["members"], "--nonmembers", records["nonmembers"]]
    if name == "empty corpus":
        (place / "empty.txt").write_text("")
        return [model, "--calibration", str(place / "empty.txt")]
    if name == "short corpus":
        (place / "short.txt").write_text("x" * 100)
        return [model, "--calibration", str(place / "short.txt")]
    if name == "broken line":
        (place / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
        return [model, "--calibration", str(place / "broken.jsonl")]
    if name == "broken record":
        (place / "broken.jsonl").write_text('{"text": "fine"}\n\n{"text": 3}\n')
        return [model, "--members", str(place / "broken.jsonl"), "--nonmembers", records["nonmembers"]]
    if name == "same sides":
        return [model, "--members", records["members"], "--nonmembers", records["members"]]
    if name == "one side":
        return [model, "--members", records["members"]]
    if name == "reference without records":
        return [model, "--reference", model]
    if name == "NaN":
        damaged_model(place / "nan", model)
        return [str(place / "nan")]
    if name == "no tokenizer":
        tiny_llama().save_pretrained(place / "bare")
        return [str(place / "bare")]
    return {
        "unknown method": [model, "--method", "baby"],
        "wide groups": [model, "--group-size", "64"],
        "odd groups": [model, "--group-size", "20"],
        "8-bit asymmetric": [model, "--bits", "8", "--asymmetric"],
        "unknown format": [model, "--format", "onnx"],
        "no model": [str(place / "nothing")],
        "long window": [model, "--window", "513", "--windows", "4"],
        "unknown device": [*[model, *audit], "--device", "gpu"],
    }[name]


LINES = {
    "empty corpus": "empty.txt is too short: it has 0 tokens; wanted at least 512 (8 windows of 64)",
    "short corpus": "short.txt is too short: it has 100 tokens; wanted at least 512 (8 windows of 64)",
    "broken line": "broken.jsonl:2 is not JSON",
    "broken record": "broken.jsonl:3 has no field 'text'",
    "same sides": "members and non-members are the same 12 records",
    "one side": "wanted both --members and --nonmembers",
    "reference without records": "--canaries and --reference serve the audit",
    "NaN": "tensor model.layers.1.mlp.up_proj.weight holds 1 NaN",
    "no tokenizer": "has no tokenizer",
    "unknown method": "did you mean 'babai'?",
    "wide groups": "group size 64 is larger than the 32 columns",
    "odd groups": "group size 20 does not divide the 32 columns",
    "8-bit asymmetric": "cannot hold 8-bit asymmetric codes",
    "unknown format": "unknown format 'onnx'; choose one of: compressed-tensors, dense",
    "no model": "no model at",
    "long window": "--window 513 is longer than the model's context of 512 tokens",
    "unknown device": "gpu",
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_mistake_is_one_line_exit_2_and_no_trace(command, name, workplace, records, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    _, recipe = workplace
    arguments = mistake(name, recipe.model, tmp_path / "in", records)
    for flag, value in {
        "--windows": "8",
        "--window": "64",
        "--group-size": "16",
        "--calibration": recipe.calibration,
        "--text": recipe.evaluation,
        "--evaluation-windows": "3",
    }.items():
        if flag not in arguments:
            arguments += [flag, value]
    if name == "long window":
        (tmp_path / "in" / "long.txt").write_text(builtin_text()[:8000])
        for flag in ("--calibration", "--text"):
            arguments[arguments.index(flag) + 1] = str(tmp_path / "in" / "long.txt")
    capsys.readouterr()
    out = ["--out", str(tmp_path / "run")] if command == "quantize" else []
    assert cli.run([command, *arguments, *out]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if not line.startswith("[")]
    assert len(errors) == 1, shown.err
    assert errors[0].startswith("geoquant: error: ")
    assert LINES[name] in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_with_something_in_it_is_left_alone(workplace, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("five years of work")
    for resume in ([], ["--resume"]):
        assert cli.run(["quantize", workplace[1].model, "--out", str(tmp_path / "run"), *resume]) == 2
        assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_refusal_leaves_an_empty_folder_where_it_was_and_makes_none(workplace, tmp_path, monkeypatch):
    wanted = workplace[1].model_copy(update={"method": "baby"})
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("mine", "new", "mine/a/b"):
        with pytest.raises(UserError, match="unknown method"):
            quantize(wanted, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_finished_run_is_not_overwritten(run_of, capsys):
    report, run = run_of("4 bits")
    before = (run / "report.json").read_bytes()
    assert cli.run(["quantize", report["recipe"]["model"], "--out", str(run)]) == 2
    assert "already holds a run; add --resume, or choose a new folder" in capsys.readouterr().err
    assert (run / "report.json").read_bytes() == before


# --- eval ---------------------------------------------------------------------------------------------------


def test_eval_refuses_what_it_cannot_compare(workplace, tmp_path):
    _, recipe = workplace
    settings = {"text": recipe.evaluation, "count": 2, "length": 64}
    tiny_llama(vocab_size=320).save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=r"wider has 320 tokens; wanted 304 as in --reference"):
        examine.evaluate(str(tmp_path / "wider"), reference=recipe.model, **settings)
    tiny_llama().save_pretrained(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"cut .* into different tokens"):
        examine.evaluate(str(tmp_path / "other"), reference=recipe.model, **settings)


def test_eval_refuses_windows_beyond_the_context(workplace):
    with pytest.raises(UserError, match="--window 513 is longer than the model's context of 512 tokens"):
        examine.evaluate(workplace[1].model, workplace[1].evaluation, 1, 513)


def test_audit_refuses_a_negative_seed(workplace):
    with pytest.raises(UserError, match=r"option seed: .* got -1; choose a value of at least 0"):
        auditing.audit(workplace[1].model, "in.jsonl", "out.jsonl", seed=-1)


def test_a_bug_before_the_first_result_leaves_no_trace(workplace, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "prepare", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        quantize(workplace[1], tmp_path / "run")
    assert not (tmp_path / "run").exists()

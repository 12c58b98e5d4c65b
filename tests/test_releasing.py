"""Runs with a guarantee: everything passes through the mechanism, and nothing after it sees the private model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import make_tokenizer, tiny_llama
from geoquant import cli, pipeline, protecting
from geoquant.data.private import make_records
from geoquant.data.records import write_records
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.model.load import load
from geoquant.pipeline import export, make_plan, quantize
from geoquant.privacy.guarantee import shards
from geoquant.privacy.guarantee.noise import Slack, epsilon_with
from geoquant.privacy.guarantee.shards import noisy_mean
from geoquant.progress import silent
from geoquant.recipe import Recipe, checked
from geoquant.releasing import HARMLESS, check_claim, chosen_by
from geoquant.report.build import render

SHORT = {
    "windows": 4,
    "window": 32,
    "evaluation_windows": 2,
    "compute": "float32",
    "verify": False,
    "gradient_share": 1.0,
}
CLAIM = {"epsilon": 8.0, "radius": 0.5}
BOX = {"bits": 4, "group_size": 16, "keep": 0.1, "method": "dqc", "order": "activation", "static_scales": True}
SIGMA = 0.5 * 0.60023  # of the claim, from the sigma / Delta that epsilon 8 at delta 1e-5 needs


pytestmark = pytest.mark.usefixtures("constant_machine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a fine-tune of it with other side files, and a text. Read only."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "text.txt").write_text(builtin_text()[:3000])
    made = make_records(24)
    for name, part in (("members", made[:12]), ("nonmembers", made[12:])):
        write_records(folder / f"{name}.jsonl", part)
    tuned = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for own in tuned.parameters():
        own.data += 0.02 * torch.randn(own.shape, generator=torch.Generator().manual_seed(own.numel()))
    tuned.generation_config.max_length = 77
    tuned.config.rms_norm_eps = 1e-3
    tuned.save_pretrained(folder / "tuned")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "said in private"
    tokenizer.save_pretrained(folder / "tuned")
    return folder


def asked(place, **values) -> Recipe:
    given = {"model": str(place / "tuned"), "base": str(place / "base"), "calibration": str(place / "text.txt")}
    given |= {"evaluation": str(place / "text.txt"), **SHORT, **CLAIM, **values}
    return checked({name: value for name, value in given.items() if value is not None})


def poisoning(patch, place, tuned):
    """After the release the private model is another one, in memory and on the disk."""
    shutil.copytree(place / "tuned", tuned)
    release = pipeline.protect

    def poisoned(run, recipe, loaded, public, progress, *more, **options):
        facts = release(run, recipe, loaded, public, progress, *more, **options)
        generator = torch.Generator().manual_seed(0)
        for own in loaded.model.parameters():
            own.data = torch.randn(own.shape, generator=generator)
        wild = {name: own.data.clone() for name, own in loaded.model.named_parameters()}
        save_file(wild, tuned / "model.safetensors", metadata={"format": "pt"})
        return facts

    patch.setattr(pipeline, "protect", poisoned)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """The default way, once, poisoned. Read only."""
    folder = tmp_path_factory.mktemp("released")
    with pytest.MonkeyPatch.context() as patch:
        poisoning(patch, place, folder / "tuned")
        report = quantize(asked(place, model=str(folder / "tuned")), folder / "run")
    shutil.copy(place / "tuned" / "model.safetensors", folder / "tuned")
    return folder / "run", report


def alone(place, run, out, **values):
    """The released folder, compressed as anybody could who was given nothing else."""
    given = {"model": str(run / "protected"), "base": None, "epsilon": None, "radius": None}
    quantize(asked(place, **given, **values), out)
    return out


def held(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[file].keys() == other[file].keys() and all(torch.equal(one[file][n], other[file][n]) for n in one[file])
        for file in one
    )


# ---- what is released


def test_every_tensor_is_the_fine_tune_with_noise_of_the_stated_size(place, run):
    folder, report = run
    tuned, found = load_file(place / "tuned" / "model.safetensors"), load_file(folder / "protected/model.safetensors")
    assert found.keys() == tuned.keys()
    kinds = [name.split(".")[-2] + "." + name.split(".")[-1] for name in found]
    for kind in ("embed_tokens.weight", "q_proj.bias", "down_proj.bias", "norm.weight", "o_proj.weight"):
        assert kind in kinds
    for name, own in found.items():
        apart = (own - tuned[name]).double()
        # The standard deviation of so many normal numbers lies this close to its own.
        assert float(apart.square().mean().sqrt()) == pytest.approx(SIGMA, rel=5 / (2 * apart.numel()) ** 0.5), name
    every = torch.cat([(own - tuned[name]).flatten() for name, own in found.items()]).double()
    assert float(every.std()) == pytest.approx(SIGMA, rel=0.02)
    assert abs(float(every.mean())) < 5 * SIGMA / len(every) ** 0.5
    assert report["privacy"]["guarantee"]["scope"].startswith(f"{len(found)} of {len(found)} tensors")


def test_a_private_model_poisoned_after_the_release_changes_no_bit(place, run, tmp_path):
    """Steps, order, rates, metric and token weights: none of them reads private weights."""
    folder, _ = run
    truth = alone(place, folder, tmp_path / "alone")
    for part in ("sites", "coded"):
        assert held(folder / part)
        assert same(held(folder / part), held(truth / part)), part
    weights = [load_file(where / "token_weights.safetensors") for where in (folder, truth)]
    assert same({"": weights[0]}, {"": weights[1]})


def test_nor_in_a_box_with_kept_columns_and_frozen_scales(place, tmp_path, monkeypatch):
    """Scales, order by activation, kept columns and the compensation into them."""
    poisoning(monkeypatch, place, tmp_path / "tuned")
    quantize(asked(place, model=str(tmp_path / "tuned"), **BOX), tmp_path / "run")
    truth = alone(place, tmp_path / "run", tmp_path / "alone", **BOX)
    for part in ("sites", "model", "adapter"):
        assert held(tmp_path / "run" / part)
        assert same(held(tmp_path / "run" / part), held(truth / part)), part


def test_files_beside_the_weights_are_the_bases(place, run):
    folder, report = run
    for shipped in (folder / "coded", folder / "protected"):
        assert json.loads((shipped / "config.json").read_text())["rms_norm_eps"] == 1e-6
        assert json.loads((shipped / "generation_config.json").read_text()).get("max_length") != 77
        assert not any("said in private" in path.read_text() for path in shipped.glob("*.j*"))
    assert "public base's" in report["privacy"]["guarantee"]["files"]


def test_a_run_that_goes_on_draws_no_noise_and_a_new_one_draws_other(place, run, tmp_path, monkeypatch):
    folder, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "sites")
    (copy / "report.json").unlink()
    monkeypatch.setattr(protecting, "release_model", lambda *_, **__: pytest.fail("released again"))
    quantize(asked(place, model=str(folder.parent / "tuned")), copy, resume=True)
    assert same(held(copy / "sites"), held(folder / "sites"))
    monkeypatch.undo()

    # The seed is the same.
    before = load_file(folder / "protected/model.safetensors")
    for name in ("one", "other"):
        after = released_alone(asked(place, seed=7), tmp_path / name)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        before = after


def released_alone(recipe, folder):
    """Nothing but the step that makes RUN/protected; the tensors in it."""
    loaded = load(recipe.model)
    head = loaded.model.get_output_embeddings().weight.detach()  # the report compares with it once more
    before = head.clone()
    protecting.protect(folder, recipe, loaded, torch.zeros(1, 8, dtype=torch.int64), silent)
    assert torch.equal(head, before)
    return load_file(folder / "protected/model.safetensors")


def test_released_weights_that_are_gone_are_not_drawn_again(place, run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/protected")
    (tmp_path / "copy/report.json").unlink()
    shutil.rmtree(tmp_path / "copy/sites")  # what was solved says nothing of what was released
    with pytest.raises(UserError, match="drawing noise again would be a second release"):
        quantize(asked(place, model=str(folder.parent / "tuned")), tmp_path / "copy", resume=True)


def test_a_finished_run_is_exported_without_the_private_model(place, tmp_path, run):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    manifest["recipe"] |= {"model": str(tmp_path / "gone"), "base": str(tmp_path / "gone")}
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    export(tmp_path / "run", "dense", verify=False)
    dense, protected = (load_file(tmp_path / "run" / n / "model.safetensors") for n in ("dense", "protected"))
    norms = [name for name in dense if "norm" in name or "bias" in name]
    assert norms
    assert all(torch.equal(dense[name], protected[name]) for name in norms)


# ---- what is said


def test_a_choice_by_a_frontier_is_told_where_it_was_assumed_that_nobody_looked(run):
    entry = run[1]["privacy"]["guarantee"]
    assert chosen_by(entry, None) == chosen_by(entry, {"frontier": None}) == entry
    told = chosen_by(entry, {"frontier": "F"})
    assert "No setting was chosen" in entry["assumes"]
    assert "No setting was chosen" not in told["assumes"]
    assert all("measured on the private model" in told[key] for key in ("assumes", "not_covered", "sentence"))
    assert "was a release of the same weights, too" in told["again"]


def test_the_report_says_all_of_it(run):
    folder, report = run
    entry = report["privacy"]["guarantee"]
    assert (entry["epsilon"], entry["delta"]) == (8.0, 1e-5)
    for part in (
        "within 0.5 of each other", "about weights, not about people", "no seed kept", "The run's own report",
        "Other releases from the same private data",
    ):  # fmt: skip
        assert part in entry["sentence"], part
    assert "calibration text" in entry["assumes"]
    assert "is public" in entry["assumes"]
    page = (folder / "report.html").read_text()
    for key in ("adjacency", "mechanism", "scope", "assumes"):
        assert entry[key].split(",")[0].replace("'", "&#39;") in page, key
    assert "Formal guarantee, with its scope" in page
    assert "No formal guarantee" not in page
    assert "Leakage was not measured." in page
    without = {**report, "privacy": {**report["privacy"], "guarantee": None}}
    assert "No formal guarantee" in render(without)


def test_what_a_second_release_adds_is_said_in_numbers(run):
    """Two Gaussian mechanisms of one mu are one of sqrt(2) mu."""
    entry = run[1]["privacy"]["guarantee"]
    mu = float(entry["mechanism"].split("-GDP")[0].rsplit(" ", 1)[1])
    assert f"({epsilon_with(2**0.5 * mu, 1e-5, Slack(1)):.3g}"[:4] in entry["again"]


def test_the_price_is_told_before_the_work(place, run):
    told = make_plan(asked(place, radius=50.0))["warnings"]
    price = next(warning for warning in told if warning.startswith("noise of 30"))
    assert "0.00 of 3.25 bits per weight remain; expect no useful model" in price
    assert "DP-SGD" in price
    assert any(warning.startswith("noise of 0.3 ") for warning in run[1]["warnings"])


def test_the_guarantee_stands_beside_attacks_too(place, tmp_path, capsys):
    """From the command line, with an audit: the summary's sentence, and exit code 0."""
    command = ["quantize", place / "tuned", "--base", place / "base", "--epsilon", "2", "--radius", "0.1"]
    command += ["--members", place / "members.jsonl", "--nonmembers", place / "nonmembers.jsonl"]
    command += ["--calibration", place / "text.txt", "--text", place / "text.txt", "--windows", 2, "--window", 32]
    command += ["--evaluation-windows", 2, "--no-verify", "--out", tmp_path / "run"]
    assert cli.run([str(part) for part in command]) == 0
    assert "formal guarantee: (2, 1e-05)-indistinguishable for neighbours" in capsys.readouterr().out
    privacy = json.loads((tmp_path / "run/report.json").read_text())["privacy"]
    assert privacy["attacks"]
    assert privacy["guarantee"]["epsilon"] == 2.0
    page = (tmp_path / "run/report.html").read_text()
    assert "Formal guarantee, with its scope" in page
    assert "Membership attacks" in page


# ---- shards, and a trainer's own guarantee


def shard(place, folder, sign: float):
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    for own in model.parameters():
        own.data += sign * 0.01
    model.save_pretrained(folder)
    return str(folder)


def test_shards_release_the_noisy_mean_of_their_clipped_changes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "noisy_mean", lambda clipped, k, sigma: noisy_mean(clipped, k, 1e-6))
    folders = [shard(place, tmp_path / f"shard-{i}", sign) for i, sign in enumerate((1.0, 1.5, -2.0, 50.0))]
    values = {"model": str(place / "base"), "base": None, "radius": None, "shards": tuple(folders), "clip": 1.0}
    found = released_alone(asked(place, **values), tmp_path / "run")
    base = load_file(place / "base" / "model.safetensors")
    count = sum(own.numel() for own in base.values())
    changes = [0.01 * sign * min(1.0, 1.0 / (0.01 * abs(sign) * count**0.5)) for sign in (1.0, 1.5, -2.0, 50.0)]
    for name, own in base.items():
        assert torch.allclose(found[name] - own, torch.tensor(sum(changes) / 4), atol=1e-5), name
    entry = json.loads((tmp_path / "run/protected/protection.json").read_text())["guarantee"]
    assert "one of 4 disjoint shards" in entry["adjacency"]
    assert "Every record lies in one shard" in entry["assumes"]


def test_a_trainers_guarantee_is_passed_through_and_nothing_is_noised(place, tmp_path):
    claim = {"epsilon": 3.0, "delta": 1e-6, "adjacency": "one record added", "mechanism": "DP-SGD", "who": "the lab"}
    (tmp_path / "claim.json").write_text(json.dumps(claim))
    values = {"base": None, "epsilon": None, "radius": None, "inherited": str(tmp_path / "claim.json")}
    report = quantize(asked(place, **values, formats=("dense",)), tmp_path / "run")
    tuned, found = (load_file(path / "model.safetensors") for path in (place / "tuned", tmp_path / "run/dense"))
    assert all(torch.equal(found[name], own) for name, own in tuned.items() if "norm" in name or "bias" in name)
    assert report["protection"] is None
    assert not (tmp_path / "run/protected").exists()
    entry = report["privacy"]["guarantee"]
    assert (entry["epsilon"], entry["delta"]) == (3.0, 1e-6)
    assert "as claimed by the lab" in entry["sentence"]
    assert "only if the trainer's statement covers them" in entry["files"]
    (tmp_path / "claim.json").write_text(json.dumps({**claim, "who": ""}))
    with pytest.raises(UserError, match="lacks 'who'"):
        quantize(asked(place, **values), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- what is refused


REFUSED = {
    "an epsilon alone": ({"radius": None}, "says nothing without its adjacency"),
    "no base": ({"base": None}, "which nobody named"),
    "a lever": ({"anchor": 0.5}, "--anchor takes from private data"),
    "records to look at": ({"private": "text.txt"}, "--private takes from private data"),
    "records of the same kind": ({"domain": "text.txt"}, "--domain takes from private data"),
    "private text": (
        {"members": "members.jsonl", "nonmembers": "nonmembers.jsonl", "calibration": "members.jsonl"},
        "calibration text must be public",
    ),
    "a shard twice": (
        {"base": None, "radius": None, "shards": ("base", "base"), "clip": 1.0},
        "a shard is given twice",
    ),
    "a base for what is inherited": (
        {"epsilon": None, "radius": None, "inherited": "x.json"},
        "--base serves --radius",
    ),
    "another base": ({"base": "other"}, "is no base of the model"),
    "a shard that is none": (
        {"base": None, "radius": None, "shards": ("base", "."), "clip": 1.0},
        "is no fine-tune",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_void_it_is_refused_before_the_work(case, place, tmp_path):
    values, words = REFUSED[case]
    other = tiny_llama(hidden_size=16, num_attention_heads=2)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")

    def located(value):
        if isinstance(value, tuple):
            return tuple(map(located, value))
        found = {"other": tmp_path / "other"}.get(value, place / value if isinstance(value, str) else value)
        return str(found) if isinstance(value, str) else value

    with pytest.raises(UserError, match=words):
        quantize(asked(place, **{name: located(value) for name, value in values.items()}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_copy_of_a_shard_under_another_name_is_refused_and_leaves_nothing(place, tmp_path):
    """Also one that is divided into other files, and one in a wider type; a shard that differs in a bit is let in."""
    first = shard(place, tmp_path / "one", 1.0)
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    model.save_pretrained(tmp_path / "divided", max_shard_size="20KB")
    assert (tmp_path / "divided" / "model.safetensors.index.json").exists()
    wide = {name: own.double() for name, own in load_file(tmp_path / "one" / "model.safetensors").items()}
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide" / "model.safetensors")
    values = {"model": str(place / "base"), "base": None, "radius": None, "clip": 1.0}
    for name in ("divided", "wide"):
        given = (shard(place, tmp_path / "other", 2.0), first, str(tmp_path / name))
        with pytest.raises(UserError, match=f"two shards are one fine-tune: .*; got the same .*one and .*{name}; give"):
            quantize(asked(place, **values, shards=given), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wide["model.norm.weight"][0] += 1e-9
    save_file(wide, tmp_path / "wide" / "model.safetensors")
    assert make_plan(asked(place, **values, shards=(first, str(tmp_path / "wide"))))


def test_another_tokenizer_is_refused(place, tmp_path):
    """Its files are not covered, so the base's are shipped, and those must fit."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    shutil.copytree(place / "tuned", tmp_path / "tuned")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "tuned"
    )
    with pytest.raises(UserError, match="tokenizer of the given model is not the public base's"):
        quantize(asked(place, model=str(tmp_path / "tuned")), tmp_path / "run")


class Tomorrow(Recipe):
    lever: float = 0.0


def test_an_option_that_nobody_has_looked_at_is_refused(place):
    """What it reads from private data no guarantee covers: it must be listed to be let through."""
    values = asked(place).model_dump()
    assert check_claim(Tomorrow(**values)) is not None
    with pytest.raises(UserError, match="--lever takes from private data"):
        check_claim(Tomorrow(**values, lever=0.5))
    assert set(Recipe.model_fields) >= HARMLESS

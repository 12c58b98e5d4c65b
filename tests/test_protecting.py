"""Levers on whole weights: the model that is compressed lies where the lever says, and the run is that of it."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import make_tokenizer
from geoquant import anchoring, protecting
from geoquant.data.private import make_records
from geoquant.data.records import load_split, write_records
from geoquant.errors import UserError
from geoquant.measure import prepare_texts
from geoquant.model.load import load
from geoquant.pipeline import export, quantize
from geoquant.privacy.aim import spread_over
from geoquant.privacy.anchor import anchored
from geoquant.progress import silent
from geoquant.recipe import checked

SHORT = {
    "windows": 4,
    "window": 32,
    "evaluation_windows": 2,
    "compute": "float32",
    "verify": False,
    "target": "weights",
}


pytestmark = pytest.mark.usefixtures("constant_machine")


def moved(folder, out, *, seed: int = 3, size: float = 0.02):
    """The model of a folder as if it had been fine-tuned: every parameter a little elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for own in model.parameters():
        own.data += size * torch.randn(own.shape, generator=generator)
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model_dir):
    return moved(tiny_model_dir, tmp_path_factory.mktemp("tuned") / "model")


def recipe(tuned, base, **values):
    return checked({"model": str(tuned), "base": str(base), **SHORT, **values})


@pytest.fixture(scope="module")
def anchored_run(tuned, tiny_model_dir, tmp_path_factory):
    """Played once; read only."""
    folder = tmp_path_factory.mktemp("anchored") / "run"
    asked = recipe(tuned, tiny_model_dir, anchor=0.5)
    return asked, folder, quantize(asked, folder)


def tensors(folder):
    return load_file(folder / "model.safetensors")


# ---- the lever alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_anchored_lies_between_the_two_at_its_share(seed, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight, base = (torch.randn(5, 7, generator=generator).to(dtype) for _ in range(2))
    found = anchored(weight, base, share)
    truth = base.double() + share * (weight.double() - base.double())
    assert found.dtype == dtype
    assert torch.allclose(found.double(), truth, atol=2.0 ** (-7 if dtype == torch.bfloat16 else -20))
    assert torch.equal(anchored(weight, base, 1.0), weight)
    assert torch.equal(anchored(weight, base, 0.0), base)


def test_a_share_for_every_weight():
    weight, base = torch.full((2, 2), 3.0), torch.ones(2, 2)
    share = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert anchored(weight, base, share).tolist() == [[1.0, 3.0], [2.0, 1.5]]


def test_shares_and_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"shares from 0\.5 to 1\.5"):
        anchored(torch.ones(2), torch.ones(2), torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="shares from nan"):
        anchored(torch.ones(1), torch.ones(1), float("nan"))
    with pytest.raises(ValueError, match="a base of shape"):
        anchored(torch.ones(2), torch.ones(3), 0.5)


# ---- in a run


def test_all_the_way_back_is_the_run_of_the_base(tuned, tiny_model_dir, tmp_path):
    """Codes, steps and everything else of the file are those of the base, embeddings and norms too."""
    quantize(recipe(tuned, tiny_model_dir, anchor=1.0), tmp_path / "back")
    quantize(checked({"model": str(tiny_model_dir), **SHORT}), tmp_path / "base")
    ours, truth = (tensors(tmp_path / name / "coded") for name in ("back", "base"))
    assert ours.keys() == truth.keys()
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_half_way_is_the_run_of_the_mean_and_the_report_says_so(tuned, tiny_model_dir, anchored_run, tmp_path):
    _, run, report = anchored_run
    mine, its, half = tensors(tuned), tensors(tiny_model_dir), tensors(run / "protected")
    assert half.keys() == mine.keys()
    for name, own in half.items():
        assert torch.allclose(own, (mine[name] + its[name]) / 2, atol=1e-6)
    said = report["protection"]
    assert said["lever"] == "anchor"
    assert said["guarantee"] is None
    before = sum((mine[name] - its[name]).double().square().sum() for name in mine).sqrt().item()
    assert said["distance"]["before"] == pytest.approx(before, rel=1e-5)
    assert said["distance"]["after"] == pytest.approx(before / 2, rel=1e-5)
    # Compared with what the user gave, not with what the lever made of it.
    assert report["model"]["source"] == str(tuned)
    alone = quantize(checked({"model": str(tuned), **SHORT}), tmp_path / "plain")
    assert report["quality"]["original"] == alone["quality"]["original"]


def test_a_run_that_goes_on_ends_with_the_same_bits(anchored_run, tmp_path):
    asked, whole, _ = anchored_run
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("report.json", "coded"):
        shutil.rmtree(cut / name) if (cut / name).is_dir() else (cut / name).unlink()
    sorted((cut / "sites").iterdir())[-1].unlink()
    quantize(asked, cut, resume=True)
    ours, truth = tensors(cut / "coded"), tensors(whole / "coded")
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_a_later_export_is_of_the_protected_model(tuned, anchored_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(anchored_run[1], run)
    export(run, "dense", verify=False)
    dense, half = tensors(run / "dense"), tensors(run / "protected")
    assert torch.equal(dense["model.norm.weight"], half["model.norm.weight"])
    assert not torch.equal(half["model.norm.weight"], tensors(tuned)["model.norm.weight"])


# ---- aimed


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Records for the levers and others for the audit, of one kind."""
    place = tmp_path_factory.mktemp("records")
    made = make_records(120, seed=4)
    parts = {"private": made[:12], "domain": made[12:24], "members": made[24:72], "nonmembers": made[72:]}
    for name, records in parts.items():
        write_records(place / f"{name}.jsonl", records)
    return {name: str(place / f"{name}.jsonl") for name in parts}


@pytest.fixture(scope="module")
def aimed_run(tuned, tiny_model_dir, sides, tmp_path_factory):
    """Played once; read only."""
    folder = tmp_path_factory.mktemp("aimed") / "run"
    asked = recipe(tuned, tiny_model_dir, anchor=0.5, **sides)
    return asked, folder, quantize(asked, folder)


def test_an_aimed_anchor_puts_whole_groups_back_and_keeps_the_others(tuned, tiny_model_dir, aimed_run):
    asked, run, report = aimed_run
    assert (asked.aim, asked.reference) == ("memory", str(tiny_model_dir))
    mine, its, made = tensors(tuned), tensors(tiny_model_dir), tensors(run / "protected")
    taught = load_file(run / "taught.safetensors")
    moved = whole = 0
    for name, own in made.items():
        back, kept = own == its[name], own == mine[name]
        assert (back | kept).all()
        private, rest = taught[f"private/{name}"], taught[f"domain/{name}"] + taught[f"public/{name}"].clamp_min(0)
        wanted = spread_over((0.5 * private > rest).float(), tuple(own.shape)).bool()
        assert torch.equal(back & ~kept, wanted & (mine[name] != its[name]))
        moved, whole = moved + int(wanted.sum()), whole + wanted.numel()
    said = report["protection"]
    assert 0 < moved < whole
    counts = {name: sum(own.numel() for key, own in made.items() if part_of(key) == name) for name in said["moved"]}
    assert sum(said["moved"][name] * count for name, count in counts.items()) == pytest.approx(moved)
    fell = said["taught"]["private"]
    assert fell["all"] == pytest.approx(sum(v.sum().item() for k, v in taught.items() if k.startswith("private/")))
    assert report["privacy"]["attacks"]


def part_of(name):
    return name.split(".")[-2]


def test_what_was_measured_is_not_measured_again(aimed_run, tmp_path, monkeypatch):
    asked, whole, _ = aimed_run
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("report.json", "coded", "protected", "sites"):
        shutil.rmtree(cut / name) if (cut / name).is_dir() else (cut / name).unlink()
    monkeypatch.setattr(anchoring, "taught", None)
    quantize(asked, cut, resume=True)
    ours, truth = tensors(cut / "coded"), tensors(whole / "coded")
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


@pytest.fixture
def measured(monkeypatch):
    """How often it was measured, while it is."""
    calls, taught = [], anchoring.taught
    monkeypatch.setattr(anchoring, "taught", lambda *given, **more: calls.append(given) or taught(*given, **more))
    return calls


def test_runs_share_what_was_measured_of_the_same_weights_and_texts(
    tuned, tiny_model_dir, sides, aimed_run, tmp_path, measured
):
    """Whoever comes second reads it. Another text, window, model or base is another measurement."""
    shared, (asked, whole, _) = tmp_path / "shared", aimed_run
    public = prepare_texts(load(asked.model).tokenizer, asked).calibration.tokens[: protecting.PUBLIC]

    def seen(number: int, public=public, **changes):
        own = asked.model_copy(update={"anchor": 0.1 * (number + 1), **changes})
        models = load(own.model), load(own.base)
        found, told = anchoring._taught(tmp_path / str(number), own, *models, public, shared, silent)
        assert len(measured) == len(list(shared.glob("taught-*.safetensors")))
        assert len(list(shared.iterdir())) == len(measured)  # nothing half-written
        return found, told

    first, told = seen(0)
    assert told["here"]
    truth = load_file(whole / "taught.safetensors")
    assert first.keys() == truth.keys()
    assert all(torch.equal(first[name], own) for name, own in truth.items())
    again, later = seen(1)
    assert later == {"seconds": told["seconds"], "here": False}
    assert all(torch.equal(again[name], own) for name, own in truth.items())
    copy = tmp_path / "copy.jsonl"
    shutil.copy(sides["domain"], copy)
    assert not seen(2, domain=str(copy))[1]["here"]  # told by what it says
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[1:]))
    moved(tiny_model_dir, tmp_path / "other", seed=9)
    others = [
        {"domain": str(copy)},
        {"private": sides["domain"], "domain": sides["private"]},
        {"window": 16},
        {"public": public[:2]},
        {"model": str(tmp_path / "other")},
        {"base": str(tmp_path / "other")},
    ]
    for number, changes in enumerate(others, start=3):
        assert seen(number, **changes)[1]["here"]
        assert len(measured) == number - 1
    assert not list(tmp_path.glob("[0-9]*/taught*"))


def test_of_two_that_measure_at_once_both_go_by_the_first_that_wrote(aimed_run, tmp_path, monkeypatch):
    asked, shared = aimed_run[0], tmp_path / "shared"
    models = load(asked.model), load(asked.base)
    public, taught = prepare_texts(models[0].tokenizer, asked).calibration.tokens[:4], anchoring.taught
    told = []

    def slower(*given, **more):
        """While this one measures, another process does, in another order of summing."""
        with monkeypatch.context() as patch:
            patch.setattr(
                anchoring,
                "taught",
                lambda *args, **options: {
                    text: {name: 1.001 * own for name, own in many.items()}
                    for text, many in taught(*args, **options).items()
                },
            )
            told.append(anchoring._taught(tmp_path, asked, *models, public, shared, silent)[0])
        return taught(*given, **more)

    monkeypatch.setattr(anchoring, "taught", slower)
    found, _ = anchoring._taught(tmp_path, asked, *models, public, shared, silent)
    assert found.keys() == told[0].keys()
    assert all(torch.equal(found[name], own) for name, own in told[0].items())
    assert len(list(shared.iterdir())) == 1


def test_records_that_the_levers_saw_are_told_and_learned_ones_refused(tuned, tiny_model_dir, sides, tmp_path):
    seen = recipe(tuned, tiny_model_dir, anchor=0.5, **(sides | {"private": sides["members"]}))
    split = load_split(sides["members"], sides["nonmembers"])
    (told,) = protecting.check_protection(seen, split)
    assert "the levers looked at 48 of the 48 audited members and canaries" in told
    learned = recipe(tuned, tiny_model_dir, anchor=0.5, **(sides | {"domain": sides["nonmembers"]}))
    with pytest.raises(UserError, match=r"48 records of --domain are audited too: the levers learn from them"):
        quantize(learned, tmp_path / "run")
    never = recipe(tuned, tiny_model_dir, anchor=0.5, **(sides | {"private": sides["nonmembers"]}))
    with pytest.raises(UserError, match=r"48 records of --private, .*, are in --nonmembers"):
        quantize(never, tmp_path / "run")
    both = recipe(tuned, tiny_model_dir, anchor=0.5, **(sides | {"domain": sides["private"]}))
    with pytest.raises(UserError, match=r"12 of 12 records of --private, .*, are in --domain"):
        quantize(both, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_aim_needs_both_sides(tuned, tiny_model_dir, sides, tmp_path):
    one = recipe(tuned, tiny_model_dir, anchor=0.5, aim="memory", private=sides["private"])
    with pytest.raises(UserError, match=r"--domain is missing.*--private FILE and --domain FILE"):
        quantize(one, tmp_path / "run")
    everything = recipe(tuned, tiny_model_dir, anchor=0.5, private=sides["private"])
    with pytest.raises(UserError, match=r"--private serves --aim memory.*leave out --private"):
        quantize(everything, tmp_path / "run")


# ---- what is refused


def test_an_anchor_needs_a_base_and_a_base_an_anchor(tuned, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"--anchor 0.5 goes back towards a public base.*--base MODEL"):
        quantize(checked({"model": str(tuned), **SHORT, "anchor": 0.5}), tmp_path / "run")
    with pytest.raises(UserError, match=r"--base serves --anchor.*add --anchor"):
        quantize(recipe(tuned, tiny_model_dir), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_aim_without_an_anchor_is_refused_also_beside_refinement(tuned, tmp_path):
    for more in ({}, {"refine": 2}):
        with pytest.raises(UserError, match=r"--aim memory says which weights --anchor moves; got no --anchor; add"):
            quantize(checked({"model": str(tuned), **SHORT, "aim": "memory", **more}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_its_own_base_is_refused_and_leaves_nothing(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="there is nothing to go back from"):
        quantize(recipe(tiny_model_dir, tiny_model_dir, anchor=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_protected_model_that_is_gone_is_made_again_or_named(anchored_run, tmp_path, monkeypatch):
    asked, whole, _ = anchored_run
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    weights = run / "protected" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"protected, the model that this run compresses, is gone.*--resume"):
        export("run", "dense", verify=False)
    (run / "report.json").unlink()
    quantize(asked, run, resume=True)
    assert weights.read_bytes() == before


def test_a_base_of_other_shapes_is_refused(tuned, tmp_path):
    from conftest import tiny_llama

    tiny_llama(intermediate_size=40).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"is no base of model: model.layers.0.mlp.gate_proj.weight is of shape \(40, 32\)"
    ):
        quantize(recipe(tuned, tmp_path / "other", anchor=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # or the right base could not be given in its place

"""Layers that go back towards the base while they are solved: every problem made again by hand, and whole runs."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import taught_by_heart
from geoquant.combining import Combining, accounted, combining
from geoquant.data.private import make_records
from geoquant.data.records import read_records, write_records
from geoquant.errors import UserError
from geoquant.lattice.grid import Grid
from geoquant.model.load import load
from geoquant.model.paging import UNMAPPED
from geoquant.model.walk import walk
from geoquant.observe.moments import clipped_weights
from geoquant.observe.replay import Replay
from geoquant.observe.side import side_moments
from geoquant.observe.stream import BlockCall, open_stream
from geoquant.observe.texts import heldout_start, padded
from geoquant.pipeline import quantize
from geoquant.privacy.scoring import encode
from geoquant.recipe import checked
from geoquant.report.control import control_sentences
from geoquant.solve import solve_model
from oracles.models import build, site_inputs, tokens_for

SHORT = {
    "windows": 4,
    "window": 32,
    "evaluation_windows": 2,
    "compute": "float32",
    "verify": False,
    "target": "weights",
}
DAMPING = 0.02
SETTINGS = {"grid": Grid(3, 8), "order": "group-aware", "damping": DAMPING}

pytestmark = pytest.mark.usefixtures("constant_machine")


def shaken(model, size: float, seed: int):
    """A copy whose every parameter is a little elsewhere."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for own in other.parameters():
        own.data += size * torch.randn(own.shape, generator=generator)
    return other


def sentences(count: int, seed: int):
    """Token sequences of all lengths from 2 to 11."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]


def opened(model, base, texts, share):
    streams = {name: open_stream(model, text.tokens, size=text.batch) for name, text in texts.items()}
    return Combining(share, base, UNMAPPED, texts, streams, torch.float32, torch.float32)


# ---- every problem


def by_hand(model, site: str, text) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums for solving and held out, each sequence alone through the whole model, without any padding."""
    sums = torch.zeros(2, *[model.get_submodule(site).weight.shape[1]] * 2, dtype=torch.float64)
    rows = [tokens[:length][None] for tokens, length in zip(text.tokens, text.lengths)]
    inputs = [site_inputs(model, [site], row)[site] for row in rows]
    for start in range(0, len(rows), text.batch):
        batch = inputs[start : start + text.batch]
        weights = clipped_weights(torch.cat(batch).square().sum(1)).split([len(x) for x in batch])
        for row, (x, own) in enumerate(zip(batch, weights), start):
            sums[int(row >= heldout_start(len(rows)))] += (x.double() * own[:, None]).T @ x.double()
    return sums[0], sums[1]


def damped(metric):
    return metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)


@pytest.mark.parametrize(
    ("name", "sequential", "share"), [("llama", "site", 0.3), ("mistral", "block", 1.0), ("qwen2 moe", "off", 0.8)]
)
def test_every_stage_is_solved_for_the_formula_of_its_own_inputs(name, sequential, share):
    """Moments from passes of the whole model over single records, with exactly the stages before it quantized."""
    model = build(name)
    base, tokens = shaken(model, 0.05, 7), tokens_for(8, 14)
    texts = {"domain": padded(sentences(8, 1), 0), "private": padded(sentences(10, 2), 0)}
    assert texts["private"].batch > 1
    solved, results = copy.deepcopy(model), []
    blocks = walk(solved, tokens[:1])
    solve_model(
        solved,
        blocks,
        open_stream(solved, tokens),
        lambda stage: ("babai", SETTINGS),
        metric="plain",
        energies=None,
        sequential=sequential,
        compute=torch.float32,
        anchor=opened(solved, base, texts, share),
        done=results.append,
    )
    replay, pending = copy.deepcopy(model), []
    for index, result in enumerate(results):
        if result.stage.sites[0].block == 2:  # two blocks tell
            break
        site = result.stage.name
        seen = site_inputs(replay, [site], tokens)[site].double()
        function = [part.T @ part for part in (seen[: 7 * 14], seen[7 * 14 :])]
        domain, private = (by_hand(replay, site, texts[side]) for side in ("domain", "private"))
        ratio = sum(function).trace() / sum(domain).trace()
        function = [(own + ratio * other) / 2 for own, other in zip(function, domain)]
        ratio = sum(function).trace() / sum(private).trace()
        metric = [(1 - share) * own + share * ratio * other for own, other in zip(function, private)]
        found = result.moments.hessian, result.moments.heldout
        for one, truth in zip(found, metric):
            assert torch.allclose(one.double(), truth, rtol=1e-3, atol=1e-4 * truth.diagonal().max().item())
        mine, its = (
            torch.cat([one.get_submodule(site.name).weight for site in result.stage.sites]).double()
            for one in (model, base)
        )
        near, back = (1 - share) * damped(sum(function)), share * ratio * damped(sum(private))
        target = (mine @ near + its @ back) @ torch.linalg.inv(near + back)
        assert torch.allclose(result.target.weight.double(), target, atol=2e-4)
        if share == 1:
            assert torch.allclose(result.target.weight, its.float(), atol=1e-6)
        account = result.anchored
        for key, whole, metric in (
            ("change", mine - its, None),
            ("left", target - its, None),
            ("private", mine - its, sum(private)),
            ("private_left", target - its, sum(private)),
            ("function", mine - its, sum(function)),
            ("function_left", target - its, sum(function)),
        ):
            truth = (whole**2).sum(1) if metric is None else ((whole @ metric) * whole).sum(1)
            assert torch.allclose(account[key], truth, rtol=5e-3, atol=1e-5 * max(1.0, truth.max().item())), key

        pending.append(result)
        ends = index + 1 == len(results) or results[index + 1].stage.sites[0].block != result.stage.sites[0].block
        if sequential == "site" or (sequential == "block" and ends):
            for earlier in pending:
                values, start = earlier.solution.dequantize(), 0
                for own in earlier.stage.sites:
                    replay.get_submodule(own.name).weight.data = values[start : start + own.shape[0]].clone()
                    start += own.shape[0]
            pending.clear()


class Routed(nn.Module):
    """Half of the tokens pass `some`, all of them `every`."""

    def __init__(self):
        super().__init__()
        self.every, self.some = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden):
        x = self.every(hidden)
        return x + self.some(x.flatten(0, 1)[::2]).sum()


def test_an_input_that_not_every_token_reaches_has_no_side_moments():
    text = padded(sentences(8, 3), 0)
    length = text.tokens.shape[1]
    passes = Replay(BlockCall((), {}), list(torch.randn(8 // text.batch, text.batch, length, 4)))
    given = {"keep": False, "compute": torch.float32}
    assert side_moments(Routed(), "some", passes, text, 7, **given) is None
    found = side_moments(Routed(), "every", passes, text, 7, **given)
    assert found.tokens + found.heldout_tokens == text.count


def test_a_layer_that_records_do_not_reach_goes_back_by_its_share(monkeypatch):
    """Plain interpolation, solved in the metric it would have had."""
    from geoquant import combining as module

    model = build("llama")
    base, tokens = shaken(model, 0.05, 7), tokens_for(8, 14)
    texts = {side: padded(sentences(8, seed), 0) for seed, side in enumerate(("domain", "private"))}
    monkeypatch.setattr(module, "side_moments", lambda *_, **__: None)
    solved, results, plain = copy.deepcopy(model), [], []
    same = {"metric": "plain", "energies": None, "sequential": "off", "compute": torch.float32}
    for anchor, done in ((opened(solved, base, texts, 0.25), results.append), (None, plain.append)):
        own = solved if anchor else copy.deepcopy(model)
        stream = open_stream(own, tokens)
        solve_model(
            own, walk(model, tokens[:1]), stream, lambda _: ("babai", SETTINGS), anchor=anchor, done=done, **same
        )
    for result, other in zip(results, plain, strict=True):
        its = torch.cat([base.get_submodule(site.name).weight for site in result.stage.sites])
        assert torch.allclose(result.target.weight, 0.75 * result.original + 0.25 * its, atol=1e-6)
        assert torch.allclose(result.moments.hessian, other.moments.hessian)
        assert result.anchored.keys() == {"change", "left"}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_makes_up_for_drifted_inputs_stays_where_nothing_changed(share, monkeypatch):
    """The base is the model itself: nothing can go back, and the target is the one without an anchor."""
    model, tokens = build("llama"), tokens_for(8, 14)
    texts = {side: padded(sentences(8, seed), 0) for seed, side in enumerate(("domain", "private"))}
    solved, results, given = copy.deepcopy(model), [], []
    kept = Combining.shifted

    def watched(self, stage, weight, *rest):
        given.append(weight)
        return kept(self, stage, weight, *rest)

    monkeypatch.setattr(Combining, "shifted", watched)
    solve_model(
        solved,
        walk(solved, tokens[:1]),
        open_stream(solved, tokens),
        lambda _: ("babai", SETTINGS),
        metric="plain",
        energies=None,
        sequential="site",
        compute=torch.float32,
        reference=dict(enumerate(open_stream(model, tokens).batches)),
        anchor=opened(solved, model, texts, share),
        done=results.append,
    )
    assert any((one - result.original).abs().max() > 1e-3 for one, result in zip(given, results, strict=True))
    for weight, result in zip(given, results, strict=True):
        assert torch.allclose(result.target.weight, weight, atol=1e-5)
        assert result.anchored["change"].sum() == 0
        assert result.anchored["left"].sum() < 1e-6
    facts = {"aim": "metric", "distance": {"before": 0.0, "after": 0.0}, "moved": {}}
    entries = [
        {"name": one.stage.name, "anchored": {name: own.sum().item() for name, own in one.anchored.items()}}
        for one in results
    ]
    told = accounted(facts, entries)["kept"]
    assert told == {"layers": 0, "by_share": 0, "unchanged": len(results), "private": None, "function": None}


# ---- runs


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    place = tmp_path_factory.mktemp("records")
    made = make_records(40, seed=4)
    parts = {"private": made[:12], "domain": made[12:24], "others": made[24:]}
    for name, records in parts.items():
        write_records(place / f"{name}.jsonl", records)
    return {name: str(place / f"{name}.jsonl") for name in parts}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model_dir, sides):
    return taught_by_heart(tiny_model_dir, sides["private"], tmp_path_factory.mktemp("tuned") / "model")


def recipe(tuned, base, sides, **values):
    given = {name: sides[name] for name in ("private", "domain")}
    return checked({"model": str(tuned), "base": str(base), **SHORT, "aim": "metric", "rate": 6.0, **given, **values})


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def halved(tuned, tiny_model_dir, sides, tmp_path_factory):
    """Played once; read only."""
    folder = tmp_path_factory.mktemp("metric") / "run"
    asked = recipe(tuned, tiny_model_dir, sides, anchor=0.5, formats=("geoquant", "dense"))
    return asked, folder, quantize(asked, folder)


def nll(folder, path) -> float:
    """Mean loss per token of the records in a file."""
    loaded = load(str(folder), dtype=torch.float32)
    total = count = 0.0
    for ids, _ in encode(loaded.tokenizer, read_records(path), 256):
        tokens = torch.tensor(ids)[None]
        logits = loaded.model(tokens).logits[0, :-1].double()
        total += nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


def test_what_was_learned_by_heart_fades_and_the_report_says_how(tuned, tiny_model_dir, sides, halved, tmp_path):
    """Beside the base, whose losses on both sides are those of records nobody learned."""
    _, run, report = halved
    plain = {"model": str(tuned), **SHORT, "rate": 6.0, "formats": ("dense",)}
    quantize(checked(plain), tmp_path / "plain")
    folders = {"base": tiny_model_dir, "plain": tmp_path / "plain" / "dense", "metric": run / "dense"}
    losses = {name: {side: nll(folder, sides[side]) for side in sides} for name, folder in folders.items()}
    fell = {name: losses["base"]["private"] - losses[name]["private"] for name in ("plain", "metric")}
    assert fell["plain"] > 0.3, losses
    assert fell["metric"] < 0.75 * fell["plain"], losses
    # How much better they are known than others of their kind.
    known = {name: own["others"] - own["private"] for name, own in losses.items()}
    assert known["metric"] - known["base"] < 0.75 * (known["plain"] - known["base"]), losses

    said = report["protection"]
    assert (said["lever"], said["aim"], said["anchor"], said["guarantee"]) == ("anchor", "metric", 0.5, None)
    mine, its = tensors(tuned), tensors(tiny_model_dir)
    before = sum((mine[name] - its[name]).double().square().sum() for name in mine).sqrt().item()
    assert said["distance"]["before"] == pytest.approx(before, rel=1e-5)
    assert said["distance"]["after"] < before
    assert said["kept"]["layers"] == len({site["name"] for site in report["sites"]}) - 1  # but embeddings
    assert said["kept"]["by_share"] == 0
    assert 0 < said["kept"]["private"] < 1
    assert set(said["moved"].values()) == {1.0}
    assert {"embed_tokens", "norm", "q_proj", "down_proj"} <= said["moved"].keys()
    assert "went back" in control_sentences(report)[0]
    told = (run / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert all(sentence in told for sentence in control_sentences(report))


def test_what_is_no_layer_goes_back_by_its_share_and_layers_wait(tuned, tiny_model_dir, halved):
    mine, its, made = tensors(tuned), tensors(tiny_model_dir), tensors(halved[1] / "protected")
    for name, own in made.items():
        layer = ".layers." in name and "norm" not in name
        assert torch.allclose(own, mine[name] if layer else (mine[name] + its[name]) / 2, atol=1e-6), name


def test_all_the_way_is_the_base_in_the_metric_of_private_text(tuned, tiny_model_dir, sides, tmp_path):
    asked = recipe(tuned, tiny_model_dir, sides, anchor=1.0, rate=8.0, formats=("dense",))
    report = quantize(asked, tmp_path / "run")
    said = report["protection"]
    assert said["distance"]["after"] < 1e-5 * said["distance"]["before"]
    assert said["kept"]["private"] < 1e-5
    its, made = (tensors(folder) for folder in (tiny_model_dir, tmp_path / "run" / "dense"))
    for name in its.keys() & made.keys():
        assert (made[name] - its[name]).norm() < 0.05 * its[name].norm(), name  # eight bits


def test_a_run_that_goes_on_ends_with_the_same_bits(halved, tmp_path):
    asked, whole, report = halved
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("report.json", "coded", "dense"):
        shutil.rmtree(cut / name) if (cut / name).is_dir() else (cut / name).unlink()
    for path in sorted((cut / "sites").iterdir())[3:]:
        path.unlink()
    again = quantize(asked, cut, resume=True)
    ours, truth = tensors(cut / "coded"), tensors(whole / "coded")
    assert all(torch.equal(ours[name], truth[name]) for name in truth)
    assert again["protection"] == report["protection"]


def test_the_size_is_the_one_asked_for(halved):
    """The combined metric has the trace of the other, so that steps mean what they did."""
    assert halved[2]["size"]["bits_per_weight"] == pytest.approx(6.0, abs=0.15)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"forget": 2}, r"--forget moves whole models.*leave out --forget, or use --aim memory"),
        ({"refine": 2}, r"--refine keeps codes to a model.*leave out --refine"),
        ({"anchor": 0.0}, r"--aim metric says which weights --anchor moves; got no --anchor"),
        ({"domain": None}, r"--aim metric compares what .*--domain is missing; wanted --private FILE and --domain"),
        ({"private": None}, r"--private is missing"),
        ({"base": None}, r"goes back towards a public base"),
        ({"epsilon": 4.0, "radius": 0.1}, "beside a guarantee"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(
    values, said, tuned, tiny_model_dir, sides, tmp_path
):
    given = recipe(tuned, tiny_model_dir, sides, anchor=0.5).model_dump(exclude_defaults=True) | values
    with pytest.raises(UserError, match=said):
        quantize(checked({name: value for name, value in given.items() if value is not None}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_opened_where_nothing_is_combined(tuned, tiny_model_dir, sides):
    for values in ({"aim": "memory", "anchor": 0.5}, {"aim": "everything", "anchor": 0.5}, {"aim": "metric"}):
        asked = recipe(tuned, tiny_model_dir, sides, **values)
        assert combining(asked, None, torch.float32, UNMAPPED) is None
    assert accounted(None, []) is None
    other = {"aim": "memory"}
    assert accounted(other, []) is other

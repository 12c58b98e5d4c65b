"""The full-precision stream beside the quantized one, and what runs aimed at its outputs gain."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from geoquant.data.text import builtin_text
from geoquant.lattice.grid import Grid
from geoquant.model.walk import walk, write_weight
from geoquant.observe.reference import Reference
from geoquant.observe.stream import open_stream
from geoquant.pipeline import quantize
from geoquant.plan import estimate
from geoquant.recipe import checked
from oracles.models import block_outputs, build, site_inputs, tokens_for
from test_solve import batches_of, run

WINDOWS, LENGTH = 6, 12


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2 moe"])
def test_it_sees_the_model_as_it_was(name, compute):
    """Inputs of every stage and outputs of every block, while all weights are replaced by noise."""
    model, tokens = build(name), tokens_for(WINDOWS, LENGTH)
    untouched, blocks = build(name), walk(model, tokens[:1])
    stream = open_stream(model, tokens, compute)
    reference = Reference(dict(enumerate(stream.batches)), compute)
    stages = [stage.name for block in blocks for stage in block.stages]
    inputs = site_inputs(untouched, stages, tokens)
    outputs = block_outputs(untouched, [block.name for block in blocks], tokens)
    tolerance = 1e-4 if compute == torch.float32 else 0.1
    for block, call in zip(blocks, stream.calls):
        reference.enter(model.get_submodule(block.name), call)
        for place, stage in enumerate(block.stages):
            waiting = frozenset(
                site.name.removeprefix(f"{block.name}.") for later in block.stages[place:] for site in later.sites
            )
            site = stage.name.removeprefix(f"{block.name}.")
            found = torch.cat(list(reference.inputs(site, waiting, keep=len(stage.sites) == 1).values()))
            expected = inputs[stage.name]
            assert (found.float() - expected).norm() < tolerance * expected.norm(), stage.name
            for part in stage.sites:
                write_weight(model.get_submodule(part.name), torch.randn(part.shape))
        reference.leave()
        difference = torch.cat(list(reference.batches.values())) - outputs[block.name]
        assert difference.norm() < tolerance * outputs[block.name].norm()


@pytest.mark.parametrize("metric", ["plain", "gradient"])
def test_with_full_precision_inputs_the_target_is_the_weights(metric):
    """No drift at all, not even in the last bit."""
    model, tokens = build("llama"), tokens_for(8, LENGTH)
    expected, _ = run(model, tokens, metric=metric, sequential="off")
    solved, results = run(model, tokens, metric=metric, sequential="off", reference=batches_of(model, tokens))
    for result in results:
        assert not result.moments.drift.any()
        assert not result.moments.heldout_drift.any()
        assert torch.equal(result.target.weight, result.original)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, solved.state_dict()[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2 moe"])
def test_block_outputs_come_closer_to_full_precision(name):
    """On the calibration tokens and on fresh ones, in every block but the first by a clear margin."""
    model, tokens, fresh = build(name), tokens_for(24, 32), tokens_for(24, 32, seed=5)
    names = [block.name for block in walk(model, tokens[:1])]
    settings = {"grid": Grid(3, 8), "keep": 0.0}

    def errors(**options) -> list[list[float]]:
        solved, _ = run(model, tokens, settings=settings, **options)
        found = []
        for words in (tokens, fresh):
            truth, outputs = block_outputs(model, names, words), block_outputs(solved, names, words)
            found.append([((outputs[at] - truth[at]).norm() / truth[at].norm()).item() for at in names])
        return found

    plain, aimed = errors(), errors(reference=batches_of(model, tokens))
    for before, after in zip(plain, aimed):
        assert after[0] < before[0]
        assert all(new < 0.93 * old for old, new in zip(before[1:], after[1:])), (before, after)


def test_a_broken_metric_leaves_the_weights_as_target():
    model, tokens = build("llama"), tokens_for(8, LENGTH)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    _, results = run(model, tokens, reference=batches_of(model, tokens))
    broken = [result for result in results if result.warning]
    assert broken
    assert all(torch.equal(result.target.weight, result.original) for result in broken)


# --- from end to end ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_model_dir):
    place = tmp_path_factory.mktemp("texts")
    (place / "calibration.txt").write_text(builtin_text()[:6000])
    (place / "evaluation.txt").write_text(builtin_text()[6000:8000])
    return {
        "model": str(tiny_model_dir),
        "calibration": str(place / "calibration.txt"),
        "evaluation": str(place / "evaluation.txt"),
        "windows": 8,
        "window": 64,
        "evaluation_windows": 3,
        "verify": False,
    }


GRIDS = {"box": {"bits": 3, "group_size": 16}, "lattice": {"rate": 4.0, "gradient_share": 0.5}}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_that_lost_sites_ends_with_the_same_bits(grid, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    recipe = checked({**texts, **GRIDS[grid]})
    report = quantize(recipe, tmp_path / "whole")
    strengths = [site["target_strength"] for site in report["sites"] if site["kind"] != "tied"]
    assert strengths[0] == 0.0  # nothing is quantized before it
    assert max(strengths) > 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    files = sorted((tmp_path / "whole" / "sites").glob("*.safetensors"))
    for path in files[1::2]:
        (tmp_path / "again" / "sites" / path.name).unlink()
    again = quantize(recipe, tmp_path / "again", resume=True)
    for path in files:
        other = load_file(tmp_path / "again" / "sites" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(other[name], tensor), (path.name, name)
    assert again["quality"]["quantized"] == report["quality"]["quantized"]
    for one, other in zip(report["sites"], again["sites"]):
        assert one == other


@pytest.mark.parametrize("sequential", ["off", "block"])
def test_nothing_is_spent_where_no_drift_is_followed(sequential, texts, tmp_path, monkeypatch):
    """Inputs that the stages before do not show in: both targets are the weights, and no second stream is run."""
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    runs = {}
    for target in ("outputs", "weights"):
        recipe = checked({**texts, **GRIDS["box"], "sequential": sequential, "target": target})
        assert not recipe.follows_drift
        runs[target] = quantize(recipe, tmp_path / target)["sites"]
    assert runs["outputs"] == runs["weights"]
    assert "target_strength" not in runs["outputs"][0]

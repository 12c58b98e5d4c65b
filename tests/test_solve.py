"""The sequential walk, replayed by an oracle that runs the whole model from scratch before every stage."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from geoquant.lattice.grid import Grid
from geoquant.methods import METHODS, Problem
from geoquant.methods.rtn import solve as round_to_nearest
from geoquant.methods.target import output_target
from geoquant.model.walk import find_blocks, walk
from geoquant.observe.gradient import token_energies
from geoquant.observe.moments import clipped_weights
from geoquant.observe.stream import open_stream, spread
from geoquant.solve import heldout_start, install, restore, solve_model
from oracles.models import build, gradient_energies, moments_by_hand, site_inputs, tokens_for

WINDOWS, LENGTH = 10, 14  # one window is held out: the last batch of two straddles the border
SETTINGS = {"grid": Grid(3, 8), "order": "group-aware", "damping": None, "keep": 0.1}


def run(model, tokens, *, method="babai", metric="plain", sequential="site", compute=torch.float32, **options):
    """Solve a copy of `model`; returns it and the results in order."""
    solved, results = copy.deepcopy(model), []
    blocks = walk(solved, tokens[:1])
    stream = open_stream(solved, tokens, compute)
    energies = None
    if metric == "gradient":
        energies = token_energies(solved, blocks, stream, tokens, compute=compute).tokens
    problem = SETTINGS | options.pop("settings", {})
    done = options.pop("done", lambda result: None)

    def keep(result):
        done(result)
        results.append(result)

    solve_model(
        solved,
        blocks,
        stream,
        lambda stage: (method, problem),
        metric=metric,
        energies=energies,
        sequential=sequential,
        compute=compute,
        done=keep,
        **options,
    )
    return solved, results


def weight_of(model, name):
    """A site's (out, in) weight, whatever the layer's own layout."""
    module = model.get_submodule(name)
    return module.weight.detach() if isinstance(module, torch.nn.Linear) else module.weight.detach().T


def sums_of(moments):
    return moments.followed, moments.drift, moments.heldout_followed, moments.heldout_drift


def token_weights(model, result, inputs, tokens, metric):
    if metric == "plain":
        return torch.ones(len(inputs))
    if metric == "gradient":
        energy = gradient_energies(model, {"stage": [site.name for site in result.stage.sites]}, tokens)["stage"]
        return (energy / energy.mean()).flatten()
    # The median is taken over each batch of two windows.
    return torch.cat([clipped_weights(part.square().sum(1)) for part in inputs.split(2 * LENGTH)])


def batches_of(model, tokens, share=1.0):
    """What enters the first block, by batch, of a share of the batches."""
    batches = open_stream(model, tokens).batches
    return {index: batches[index] for index in spread(len(batches), share)}


@pytest.mark.parametrize("outputs", [0, 1, 0.4])
@pytest.mark.parametrize("sequential", ["site", "block", "off"])
@pytest.mark.parametrize(("name", "metric"), [("llama", "plain"), ("gpt2", "clipped"), ("gemma3", "gradient")])
def test_every_stage_sees_what_a_run_from_scratch_sees(name, metric, sequential, outputs):
    """Moments of each stage, re-observed on the whole model with exactly the stages before it quantized."""
    model, tokens = build(name), tokens_for(WINDOWS, LENGTH)
    reference = batches_of(model, tokens, outputs) if outputs else None
    # Tokens whose inputs in full precision are known.
    followed = torch.tensor([row // 2 in (reference or ()) for row in range(WINDOWS)]).repeat_interleave(LENGTH)
    solved, results = run(model, tokens, metric=metric, sequential=sequential, reference=reference)
    replay, pending, border = copy.deepcopy(model), [], (WINDOWS - 1) * LENGTH
    stages = [stage for block in walk(model, tokens[:1]) for stage in block.stages]
    assert [result.stage for result in results] == stages

    for index, result in enumerate(results):
        inputs = site_inputs(replay, [result.stage.name], tokens)[result.stage.name]
        weights = token_weights(model, result, inputs, tokens, metric)
        for found, part in ((result.moments.hessian, slice(0, border)), (result.moments.heldout, slice(border, None))):
            expected = moments_by_hand(inputs[part], weights[part])
            tolerance = 2e-3 * expected.diagonal().max().item()
            torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=tolerance)
        assert result.moments.tokens == border
        assert result.moments.heldout_tokens == LENGTH

        # The problem is the stacked original weights, or what computes their outputs, against these moments, and its
        # solution what was returned.
        original = torch.cat([weight_of(model, site.name) for site in result.stage.sites])
        assert torch.equal(result.original, original)
        target = original
        if outputs:
            exact = site_inputs(model, [result.stage.name], tokens)[result.stage.name].double()
            own = weights * followed
            drift, moments = (exact - inputs) * own[:, None].double(), result.moments
            for found, metric_found, part in (
                (moments.drift, moments.followed, slice(0, border)),
                (moments.heldout_drift, moments.heldout_followed, slice(border, None)),
            ):
                expected = drift[part].T @ inputs[part].double()
                scale = expected.abs().max().item()
                torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=5e-3 * scale + 1e-4)
                expected = moments_by_hand(inputs[part], own[part])
                tolerance = 2e-3 * expected.diagonal().max().item()
                torch.testing.assert_close(metric_found.double(), expected, rtol=2e-3, atol=tolerance)
            target = output_target(original, *sums_of(result.moments)).weight
        assert torch.equal(result.target.weight if outputs else result.original, target)
        again = METHODS["babai"](Problem(target, result.moments.hessian, result.moments.heldout, **SETTINGS))
        assert torch.equal(again.codes, result.solution.codes)

        pending.append(result)
        last = index + 1 == len(results)
        ends = last or results[index + 1].stage.sites[0].block != result.stage.sites[0].block
        if sequential == "site" or (sequential == "block" and ends) or last:
            for earlier in pending:
                values, start = earlier.solution.dequantize(), 0
                for site in earlier.stage.sites:
                    weight_of(replay, site.name).copy_(values[start : start + site.shape[0]])
                    start += site.shape[0]
            pending.clear()

    for name, tensor in solved.state_dict().items():
        assert torch.equal(tensor, replay.state_dict()[name]), name


def test_only_sites_change_and_they_become_their_codes():
    """GPT-2 stores its matrices transposed: what is read back is `scale * code`, row by row of the output."""
    model, tokens = build("gpt2"), tokens_for(4, LENGTH)
    solved, results = run(model, tokens, method="dqc", settings={"grid": Grid(3, 8, False)})
    sites = {site.name for result in results for site in result.stage.sites}
    assert any("c_attn" in name for name in sites)
    for name, parameter in solved.named_parameters():
        before = model.get_parameter(name)
        if name.removesuffix(".weight") in sites:
            assert not torch.equal(parameter, before)
        else:
            assert torch.equal(parameter, before)
    for result in results:
        start = 0
        for site in result.stage.sites:
            part = result.solution.rows(start, start + site.shape[0])
            assert torch.equal(weight_of(solved, site.name), part.dequantize())
            assert weight_of(solved, site.name).shape == site.shape
            start += site.shape[0]


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("sequential", ["site", "block", "off"])
@pytest.mark.parametrize("metric", ["plain", "gradient"])
def test_resuming_gives_the_same_bits(sequential, metric, outputs):
    """Stopped after any number of stages, continued with the solutions so far."""
    model, tokens = build("llama"), tokens_for(6, LENGTH)
    options = {"metric": metric, "sequential": sequential, "method": "dqc"}
    if outputs:
        options["reference"] = batches_of(model, tokens)
    whole, results = run(model, tokens, **options)
    for stop in (1, 5, len(results)):
        known = {result.stage: result.solution for result in results[:stop]}
        resumed, rest = run(model, tokens, **options, finished=known.get)
        assert [result.stage for result in rest] == [result.stage for result in results[stop:]]
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_tokens_without_a_gradient_are_weighted_by_their_size():
    """Batch by batch: gradient energies where there are some, else clipped weights scaled to mean one."""
    model, tokens = build("llama"), tokens_for(6, LENGTH)
    blocks = walk(model, tokens[:1])
    energies = {stage.name: torch.rand(6, LENGTH) for block in blocks for stage in block.stages}
    for energy in energies.values():
        energy[2:4] = torch.nan
    results = []
    solve_model(
        copy.deepcopy(model),
        blocks,
        open_stream(model, tokens),
        lambda stage: ("rtn", {"grid": Grid(4, 8)}),
        metric="gradient",
        energies=energies,
        sequential="off",
        compute=torch.float32,
        done=results.append,
    )
    for result in results:
        inputs = site_inputs(model, [result.stage.name], tokens)[result.stage.name]
        weights = energies[result.stage.name].flatten().clone()
        rest = slice(2 * LENGTH, 4 * LENGTH)
        weights[rest] = clipped_weights(inputs[rest].square().sum(1))
        weights[rest] /= weights[rest].mean()
        border = 5 * LENGTH
        expected = moments_by_hand(inputs[:border], weights[:border])
        tolerance = 2e-3 * expected.diagonal().max().item()
        torch.testing.assert_close(result.moments.hessian.double(), expected, rtol=2e-3, atol=tolerance)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("sequential", ["site", "block", "off"])
def test_a_lean_run_holds_one_block_and_ends_the_same(sequential, outputs):
    """Solved blocks leave memory until the end; then all of them are back, to the same bits."""
    model, tokens = build("llama"), tokens_for(6, LENGTH)
    reference = batches_of(model, tokens) if outputs else None
    whole, _ = run(model, tokens, sequential=sequential, reference=reference)
    lean, known, held = copy.deepcopy(model), {}, []
    blocks = walk(lean, tokens[:1])

    def done(result):
        known[result.stage] = result.solution
        earlier = [site.name for block in blocks[: result.stage.sites[0].block] for site in block.sites]
        held.append(sum(lean.get_submodule(name).weight.untyped_storage().nbytes() for name in earlier))

    solve_model(
        lean,
        blocks,
        open_stream(lean, tokens),
        lambda stage: ("babai", SETTINGS),
        metric="plain",
        energies=None,
        sequential=sequential,
        compute=torch.float32,
        reference=reference,
        finished=known.get,
        done=done,
        lean=True,
    )
    restore(lean, blocks, known.get)
    assert max(held) == 4 * sum(len(block.sites) for block in blocks[:-1])  # one number per weight matrix
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, lean.state_dict()[name]), name


def test_results_are_handed_over_before_the_weights_change():
    """A result on disk precedes its effect: a run killed in between solves nothing twice and skips nothing."""
    model, tokens = build("llama"), tokens_for(2, LENGTH)
    solved = copy.deepcopy(model)
    blocks, seen, steps = walk(solved, tokens[:1]), [], []

    def done(result):
        for site in result.stage.sites:
            assert torch.equal(weight_of(solved, site.name), weight_of(model, site.name))
        assert result.seconds.keys() == {"observe", "solve"}
        seen.append(result.stage.name)

    solve_model(
        solved,
        blocks,
        open_stream(solved, tokens),
        lambda stage: ("rtn", {"grid": Grid(4, 8)}),
        metric="plain",
        energies=None,
        sequential="site",
        compute=torch.float32,
        done=done,
        progress=lambda phase, done, total, note="": steps.append((phase, done, total, note)),
    )
    assert seen == [stage.name for block in blocks for stage in block.stages]
    assert [step[1:3] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    for block in blocks:
        for site in block.sites:
            assert not torch.equal(weight_of(solved, site.name), weight_of(model, site.name))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("order", ["group-aware", "min-pivot"])
def test_fewer_tokens_than_columns(method, order):
    """Eight tokens, forty columns: the moments have no full rank, the solve goes on."""
    model, tokens = build("llama"), tokens_for(1, 8)
    solved, results = run(model, tokens, method=method, settings={"order": order})
    assert all(result.warning is None for result in results)
    assert all(parameter.isfinite().all() for parameter in solved.parameters())
    with torch.no_grad():
        assert solved(tokens).logits.isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_broken_stage_is_rounded_and_reported(symmetric):
    """NaN in one input channel: that stage and those behind it fall back, with a warning that names them."""
    model, tokens = build("llama"), tokens_for(4, 8)
    model.model.layers[2].post_attention_layernorm.weight.data[3] = torch.nan
    solved, results = run(model, tokens, settings={"grid": Grid(3, 8, symmetric)})
    broken = [result for result in results if result.warning]
    assert [result.stage.name for result in broken] == [
        "model.layers.2.mlp.gate_proj",
        "model.layers.2.mlp.down_proj",
    ]
    assert "model.layers.2.mlp.gate_proj" in broken[0].warning
    assert broken[0].warning.endswith("rounded to nearest instead")
    # Nothing is known of the input of `down_proj`, all of it NaN: plain rounding.
    last = broken[1]
    expected = round_to_nearest(Problem(last.original, torch.eye(last.stage.columns), grid=Grid(3, 8, symmetric)))
    assert torch.equal(last.solution.codes, expected.codes)
    assert all(result.solution.gram_schmidt.isfinite().all() for result in broken)
    for site in (site for result in results for site in result.stage.sites):
        assert weight_of(solved, site.name).isfinite().all()


def test_a_bfloat16_model_keeps_its_dtype():
    """Solved in single precision, written back in the stored one."""
    model, tokens = build("llama").to(torch.bfloat16), tokens_for(4, LENGTH)
    solved, results = run(model, tokens)
    for result in results:
        assert result.original.dtype == torch.float32
        start = 0
        for site in result.stage.sites:
            weight = weight_of(solved, site.name)
            assert weight.dtype == torch.bfloat16
            expected = result.solution.rows(start, start + site.shape[0]).dequantize()
            assert torch.equal(weight, expected.to(torch.bfloat16))
            start += site.shape[0]


def test_bfloat16_products_give_nearly_the_same_moments():
    model, tokens = build("llama"), tokens_for(4, LENGTH)
    exact, fast = (run(model, tokens, sequential="off", compute=dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    errors = [
        ((one.moments.hessian - other.moments.hessian).norm() / one.moments.hessian.norm()).item()
        for one, other in zip(exact, fast)
    ]
    assert 0 < max(errors) < 0.05


def test_moments_may_be_summed_in_double_precision():
    model, tokens = build("llama"), tokens_for(4, LENGTH)
    single = run(model, tokens, sequential="off")[1]
    double = run(model, tokens, sequential="off", moments_dtype=torch.float64)[1]
    for one, other in zip(single, double):
        assert other.moments.hessian.dtype == torch.float32
        torch.testing.assert_close(one.moments.hessian, other.moments.hessian, rtol=1e-4, atol=1e-3)


def test_installing_a_solution_writes_each_site_its_rows():
    model, tokens = build("qwen2"), tokens_for(1, 8)
    stage = walk(model, tokens)[1].stages[0]
    assert len(stage.sites) == 3
    weight = torch.randn(stage.rows, stage.columns)
    solution = round_to_nearest(Problem(weight, torch.eye(stage.columns), grid=Grid(8, 8)))
    install(model, stage, solution)
    written = torch.cat([weight_of(model, site.name) for site in stage.sites])
    assert torch.equal(written, solution.dequantize())


@pytest.mark.parametrize(("windows", "start"), [(1, 1), (3, 3), (4, 3), (15, 14), (16, 14), (32, 28), (33, 29)])
def test_one_window_in_eight_is_held_out(windows, start):
    assert heldout_start(windows) == start


def test_stages_cover_every_site_once():
    """What is solved is what the walk found, for a model with flattened tokens too."""
    model, tokens = build("qwen2 moe"), tokens_for(4, 8)
    solved, results = run(model, tokens, metric="gradient")
    names = [site.name for result in results for site in result.stage.sites]
    assert len(names) == len(set(names))
    assert names == [site.name for block in walk(model, tokens[:1]) for stage in block.stages for site in stage.sites]
    prefix, _ = find_blocks(model)
    assert all(name.startswith(prefix) for name in names)
    assert all(dataclasses.is_dataclass(result) and result.warning is None for result in results)
    assert solved is not model

"""Block by block, a model computes what it computes whole."""

from __future__ import annotations

import copy

import pytest
import torch

from geoquant.model.walk import find_blocks, walk
from geoquant.observe.compute import autocast, cast_call, compute_dtype, pure_copy, working_copy
from geoquant.observe.replay import Replay
from geoquant.observe.stream import Stop, batch_size, open_stream, run_block
from oracles.models import ARCHITECTURES, block_outputs, build, site_inputs, tokens_for

LENGTH = 20


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streaming_equals_the_whole_model(name):
    """Every block's output on every window: masks, positions, windows of attention, embedding scales."""
    model, tokens = build(name), tokens_for(6, LENGTH)
    prefix, blocks = find_blocks(model)
    expected = block_outputs(model, [f"{prefix}.{index}" for index in range(len(blocks))], tokens)
    stream = open_stream(model, tokens)
    assert hook_count(model) == 0
    batches = stream.batches
    for index, (block, call) in enumerate(zip(blocks, stream.calls)):
        with torch.no_grad():
            batches = [run_block(block, call, hidden) for hidden in batches]
        torch.testing.assert_close(torch.cat(batches), expected[f"{prefix}.{index}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_watched_inputs_are_those_of_the_whole_model(name):
    """Every stage of the first block: what its sites read, in the order of the tokens."""
    model, tokens = build(name), tokens_for(5, LENGTH)
    block = walk(model, tokens[:1])[0]
    expected = site_inputs(model, [site.name for site in block.sites], tokens)
    stream = open_stream(model, tokens)
    for stage in block.stages:
        seen = []
        Replay(stream.calls[0], stream.batches).observe(
            model.get_submodule(block.name),
            stage.name.removeprefix(f"{block.name}."),
            lambda index, x: seen.append((index, x)),  # noqa: B023
            keep=False,
        )
        assert [index for index, _ in seen] == list(range(len(stream.batches)))
        for site in stage.sites:
            torch.testing.assert_close(torch.cat([x for _, x in seen]), expected[site.name], rtol=1e-4, atol=1e-4)
    assert hook_count(model) == 0


def test_attention_windows_differ_from_full_attention():
    """The models above do exercise their masks: without the window the outputs change."""
    for name in ("mistral", "gemma3"):
        model, tokens = build(name), tokens_for(2, LENGTH)
        with torch.no_grad():
            narrow = model(tokens).logits
            model.config.sliding_window = 64
            for module in model.modules():
                if getattr(module, "sliding_window", None) is not None:
                    module.sliding_window = 64
            wide = model(tokens).logits
        assert (narrow[:, :5] - wide[:, :5]).abs().max() < 1e-4
        assert (narrow[:, -1] - wide[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize(("windows", "size"), [(1, 1), (2, 2), (3, 1), (7, 1), (32, 2)])
def test_batches_are_equal_in_size(windows, size):
    """The captured masks fit one batch size only."""
    assert batch_size(windows) == size
    stream = open_stream(build("llama"), tokens_for(windows, 6))
    assert [len(batch) for batch in stream.batches] == [size] * (windows // size)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_products_stay_close(name):
    """The fast path: products in bfloat16, everything else in single precision."""
    model, tokens = build(name), tokens_for(4, LENGTH)
    prefix, blocks = find_blocks(model)
    last = f"{prefix}.{len(blocks) - 1}"
    expected = block_outputs(model, [last], tokens)[last]
    stream = open_stream(model, tokens, torch.bfloat16)
    batches = stream.batches
    with autocast(torch.device("cpu"), torch.bfloat16), torch.no_grad():
        for block, call in zip(blocks, stream.calls):
            work = working_copy(block, torch.bfloat16)
            batches = [run_block(work, call, hidden).float() for hidden in batches]
    error = torch.cat(batches) - expected
    assert 0 < error.norm() / expected.norm() < 0.05


def test_working_copies_leave_the_model_alone():
    """Matrices in the compute dtype, vectors in float32, the block itself where nothing has to change."""
    block = build("gpt2").transformer.h[0]
    before = copy.deepcopy(block.state_dict())
    assert working_copy(block, torch.float32) is block
    assert pure_copy(block, torch.float32) is block
    work = working_copy(block, torch.bfloat16)
    for parameter in work.parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim >= 2 else torch.float32)
    assert {parameter.dtype for parameter in pure_copy(block, torch.bfloat16).parameters()} == {torch.bfloat16}
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_calls_are_cast_where_they_are_floating():
    stream = open_stream(build("gemma3"), tokens_for(2, LENGTH))
    call = cast_call(stream.calls[0], torch.bfloat16)
    for table in call.kwargs["position_embeddings"]:
        assert table.dtype == torch.bfloat16
    mask = stream.calls[0].kwargs["attention_mask"]
    if mask is not None and not mask.is_floating_point():
        assert call.kwargs["attention_mask"].dtype == mask.dtype


def test_hooks_are_removed_after_an_error():
    model, tokens = build("llama"), tokens_for(2, LENGTH)
    stream = open_stream(model, tokens)
    block = model.model.layers[0]

    def fail(index, x):
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        Replay(stream.calls[0], stream.batches).observe(block, "mlp.up_proj", fail, keep=True)
    assert hook_count(model) == 0
    with pytest.raises((IndexError, Stop)):
        open_stream(model, tokens + 1000)
    assert hook_count(model) == 0


def test_compute_dtype():
    """A named dtype is obeyed; `auto` is bfloat16 only where the hardware multiplies it."""
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)

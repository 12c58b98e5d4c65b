"""Mapped weights: what is released comes back unchanged, and nothing that was written is ever released."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from geoquant.model.load import load
from geoquant.model.paging import UNMAPPED, Pages, map_weights, trim, unload
from geoquant.model.walk import write_weight
from geoquant.reporting import forget_peak_memory, peak_memory_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory maps are read from /proc")


def resident(pages: Pages) -> int:
    """KiB of the mapped ranges that are in memory, as the kernel counts them."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"^([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = (int(match[1], 16), int(match[2], 16)) in pages.ranges
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.fixture
def mapped(tiny_model_dir):
    """A freshly loaded model and the mapping of its file alone."""
    model = load(str(tiny_model_dir)).model
    return model, map_weights(model)


@linux
def test_released_weights_leave_memory_and_come_back(mapped):
    model, pages = mapped
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert len(pages.ranges) == 1
    assert resident(pages) > 100
    pages.release(model.parameters())
    assert resident(pages) <= 8  # the header before the first tensor
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name


@linux
def test_a_file_with_a_written_page_is_left_alone(mapped):
    model, _ = mapped
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 7.0
    assert map_weights(model) == UNMAPPED


@linux
def test_a_replaced_weight_is_out_of_reach(mapped):
    """`write_weight` takes new memory: releasing the model's weights afterwards does not undo it."""
    model, pages = mapped
    layer = model.model.layers[0].mlp.up_proj
    new = torch.randn(layer.weight.shape)
    write_weight(layer, new)
    assert map_weights(model).ranges == pages.ranges
    pages.release(model.parameters())
    assert torch.equal(layer.weight, new)


@linux
def test_addresses_are_not_used_anew_while_they_may_be_released(tmp_path):
    """All weights are replaced and gone; what is allocated then must not lie where `release` believes the file."""
    save_file({"weight": torch.zeros(4096, 4096)}, tmp_path / "model.safetensors")
    layer = nn.Linear(4096, 4096, bias=False, device="meta")
    layer.weight = nn.Parameter(load_file(tmp_path / "model.safetensors")["weight"], requires_grad=False)
    pages = map_weights(layer)
    assert len(pages.ranges) == 1
    write_weight(layer, torch.ones(4096, 4096))
    others = [torch.full((2048, 2048), 7.0) for _ in range(6)]
    pages.release([*others, layer.weight])
    assert all((other == 7.0).all() for other in others)
    assert (layer.weight == 1.0).all()


def test_what_is_not_mapped_is_not_touched():
    tensor = torch.arange(100_000)
    UNMAPPED.release([tensor])
    Pages(((0, 4096),)).release([tensor, torch.zeros(0), torch.zeros(3, device="meta")])
    trim()
    assert torch.equal(tensor, torch.arange(100_000))


def test_elsewhere_nothing_is_mapped(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert map_weights(nn.Linear(2, 2)) is UNMAPPED
    trim()


def test_an_unloaded_weight_keeps_shape_and_dtype():
    layer = nn.Linear(5, 3).to(torch.bfloat16)
    unload(layer)
    assert layer.weight.shape == (3, 5)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.untyped_storage().nbytes() == 2
    write_weight(layer, torch.ones(3, 5))
    assert torch.equal(layer.weight, torch.ones(3, 5).bfloat16())


@linux
def test_the_peak_of_a_run_is_its_own():
    """What the process held before (the demo's fine-tune) is not counted."""
    block = torch.ones(50_000_000)
    high = peak_memory_bytes()
    del block
    forget_peak_memory()
    low = peak_memory_bytes()  # other freed memory may have gone back too: how much, the tests before this one decide
    assert high - low > 150_000_000
    again = torch.ones(50_000_000)
    assert peak_memory_bytes() - low > 0.75 * again.nbytes

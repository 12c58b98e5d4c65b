"""Models changed everywhere in the same way: what is written is what is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_tokenizer, tiny_llama
from geoquant.errors import UserError
from geoquant.lattice.grid import Grid
from geoquant.methods import rtn
from geoquant.methods.problem import Problem
from geoquant.plan.points import Change
from geoquant.variants import noised, steps, write_variant


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A model and its base."""
    place = tmp_path_factory.mktemp("two")
    for name, seed in (("tuned", 1), ("base", 0)):
        tiny_llama(seed).save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    return place


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_interpolation_takes_every_tensor_the_same_way(two, tmp_path):
    write_variant(tmp_path / "out", str(two / "tuned"), str(two / "base"), Change("interpolate", 0.25))
    made, tuned, base = (tensors(folder) for folder in (tmp_path / "out", two / "tuned", two / "base"))
    assert made.keys() == tuned.keys()
    for name, own in made.items():
        assert torch.allclose(own, base[name] + 0.25 * (tuned[name] - base[name]), atol=1e-6)


def test_noise_is_on_linear_layers_alone_and_the_same_each_time(two, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_variant(tmp_path / name, str(two / "tuned"), None, Change("noise", 0.5), seed=seed)
    one, same, other, before = (
        tensors(folder) for folder in (tmp_path / "one", tmp_path / "two", tmp_path / "three", two / "tuned")
    )
    for name, own in one.items():
        assert torch.equal(own, same[name])
        linear = "proj" in name
        assert torch.equal(own, before[name]) is not linear
        assert torch.equal(own, other[name]) is not linear


def test_a_step_is_that_of_rounding_at_four_bits():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    solved = rtn.solve(Problem(weight, torch.eye(128), grid=Grid(4, 64, True)))
    levels = (solved.dequantize() / steps(weight)).abs()
    assert torch.allclose(levels, levels.round(), atol=1e-3)  # whole numbers of steps
    generator = torch.Generator().manual_seed(1)
    size = ((noised(weight, 0.5, generator) - weight) / steps(weight)).std().item()
    assert size == pytest.approx(0.5, rel=0.06)  # 2048 draws: four standard errors are 0.03


def test_another_base_is_refused(two, tmp_path):
    tiny_llama(intermediate_size=40).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is no base of tuned: its model\.layers"):
        write_variant(tmp_path / "out", str(two / "tuned"), str(tmp_path / "other"), Change("interpolate", 0.5))
    assert not (tmp_path / "out").exists()

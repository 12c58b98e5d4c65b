"""Quantized activations end to end: integer arithmetic by hand, and a model that is left as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from geoquant.evaluate.activations import activation_costs, quantized_inputs
from geoquant.evaluate.perplexity import difference, perplexity
from geoquant.lattice.grid import Grid
from geoquant.methods import METHODS, Problem
from geoquant.model.walk import read_weight, site_modules, write_weight
from geoquant.outliers.activation_clip import per_token, quantize
from test_perplexity import make_windows
from test_tangent import generator


class Named(nn.Linear):
    """Called with its input by name, as some models do."""

    def forward(self, hidden):
        return super().forward(hidden)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_two_layers_by_integers():
    """W4A8 in int64: products of codes, then the steps; static into the first layer, per token into the second."""
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).double()
    x = torch.randn(7, 32, generator=generator(), dtype=torch.float64) * 2
    solutions = []
    for module in (model[0], model[2]):
        weight = read_weight(module)
        solutions.append(METHODS["rtn"](Problem(weight, torch.eye(weight.shape[1]), grid=Grid(4, weight.shape[1]))))
        write_weight(module, solutions[-1].dequantize())
    arm = {"0": partial(quantize, clip=3.0), "2": per_token}
    with torch.no_grad(), quantized_inputs(model, arm):
        found = model(x)

    def by_hand(x: torch.Tensor, clip: torch.Tensor, solution) -> torch.Tensor:
        step = clip.float() / 127
        codes = (x.float() / step).round().clamp(-127, 127).long()
        return (codes @ solution.codes.long().T) * (step.double() * solution.scales[:, 0].double())

    hidden = (by_hand(x, torch.tensor(3.0), solutions[0]) + model[0].bias).relu()
    expected = by_hand(hidden, hidden.abs().amax(1, keepdim=True), solutions[1])
    assert (x.abs() > 3).any()  # something was clipped
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(x), expected, rtol=1e-3)


def test_inputs_by_name_and_of_other_types():
    model = nn.ModuleDict({"a": Named(4, 3, bias=False)}).bfloat16()
    x = torch.randn(2, 4, generator=generator()).bfloat16()
    seen = []

    def doubled(given):
        seen.append(given.dtype)
        return given * 2

    with torch.no_grad(), quantized_inputs(model, {"a": doubled}):
        assert torch.equal(model["a"](hidden=x), model["a"](x))
    assert seen == [torch.float32] * 2
    with torch.no_grad():
        plain = model["a"](x)
        with quantized_inputs(model, {"a": doubled}):
            assert torch.equal(model["a"](x), plain * 2)


def test_the_model_is_left_as_it_was_whatever_happens():
    model = tiny_llama()
    tokens = make_windows().tokens
    names = list(site_modules(model))
    with torch.no_grad():
        before = model(tokens).logits

    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), quantized_inputs(model, dict.fromkeys(names, broken)):
        model(tokens)
    assert hooks_of(model) == 0
    with (
        pytest.raises(ValueError, match=r"1 names are no modules of the model, the first is 'nothing'"),
        quantized_inputs(model, {names[0]: per_token, "nothing": per_token}),
    ):
        pass
    assert hooks_of(model) == 0
    with quantized_inputs(model, dict.fromkeys(names, per_token)):
        assert hooks_of(model) == len(names)
    assert hooks_of(model) == 0
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_costs_are_paired_with_the_same_weights():
    model = tiny_llama()
    text = make_windows(n=6)
    names = list(site_modules(model))
    arms = {
        "identity": dict.fromkeys(names, lambda x: x),
        "coarse": dict.fromkeys(names, partial(per_token, bits=4)),
        "one site": {names[0]: torch.zeros_like},
    }
    reference, found = activation_costs(model, text, arms)
    assert reference == perplexity(model, text)
    assert found["identity"].perplexity == reference
    assert (found["identity"].delta, found["identity"].se) == (0, 0)
    for arm in ("coarse", "one site"):
        with quantized_inputs(model, arms[arm]):
            own = perplexity(model, text)
        change = difference(reference, own)
        assert (found[arm].perplexity, found[arm].delta, found[arm].se) == (own, change["value"], change["se"])
        assert found[arm].delta != 0
        assert found[arm].se > 0
    # Zeroing the input of a layer without bias is zeroing its weights.
    write_weight(model.get_submodule(names[0]), torch.zeros_like(read_weight(model.get_submodule(names[0]))))
    assert found["one site"].perplexity.nll == pytest.approx(perplexity(model, text).nll, rel=1e-6)
    kept = activation_costs(model, text, {"identity": arms["identity"]}, reference=reference)
    assert kept[0] is reference
    assert kept[1]["identity"].delta != 0  # against what was given, not against these weights

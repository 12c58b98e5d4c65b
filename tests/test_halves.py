"""Products of halves on a CPU without units for them: the same numbers as torch's own, sooner."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from geoquant.data.text import windows
from geoquant.evaluate.perplexity import perplexity
from geoquant.model import halves
from geoquant.model.halves import widened


@pytest.fixture
def slow(monkeypatch):
    """As on a processor without AMX."""
    monkeypatch.setattr(halves, "multiplies_halves", lambda: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_exact_factors_rounded_once(slow, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((7, 50), (11, 50), (11,)))
    exact = (x.double() @ weight.double().T + bias.double()).float()
    with widened(torch.device("cpu")):
        found = torch.nn.functional.linear(x, weight, bias)
        same = x @ weight.T
    assert found.dtype == same.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(same.float(), (x.double() @ weight.double().T).float(), rtol=0.01, atol=1e-4)


def operands(dtype):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*size, generator=generator).to(dtype) for size in ((6, 4, 8), (6, 8, 3), (3, 3), (24, 8)))


@pytest.mark.parametrize(
    "product",
    {
        "einsum": lambda x, y, z, w: torch.einsum("bij,bjk->bik", x, y),
        "einsum of a list": lambda x, y, z, w: torch.einsum("bij,bjk->bik", [x, y]),
        "baddbmm": lambda x, y, z, w: x[..., :3].baddbmm(x, y),
        "addmm": lambda x, y, z, w: x[0, :3, :3].addmm(z, z),
        "linalg": lambda x, y, z, w: torch.linalg.matmul(x, y),
        "tensordot": lambda x, y, z, w: torch.tensordot(x, y[0], dims=1),
        "inner": lambda x, y, z, w: torch.inner(z, z),
        "convolution": lambda x, y, z, w: torch.nn.functional.conv1d(x, x[:, :, :3]),
        "convolution by channel": lambda x, y, z, w: torch.nn.functional.conv1d(x, x[:4, :1, :3], groups=4),
        "experts": lambda x, y, z, w: getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm)(
            w, y.repeat(1, 1, 8)[:2], offs=torch.tensor([8, 24], dtype=torch.int32)
        ),
        "attention": lambda x, y, z, w: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        "linear": lambda x, y, z, w: torch.nn.functional.linear(x, w),
        "@": lambda x, y, z, w: x @ y,
    }.items(),
    ids=lambda item: item[0],
)
def test_no_product_of_halves_reaches_the_processor(slow, product):
    """What torch itself is asked for, under whatever name a model asks for it."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.name() or "conv" in function.name() or "attention" in function.name():
                seen.extend(x.dtype for x in args if isinstance(x, torch.Tensor) and x.dtype != torch.int32)
            return function(*args, **(kwargs or {}))

    for dtype in (torch.bfloat16, torch.float16):
        seen = []
        with torch.no_grad(), widened(torch.device("cpu")), Seen():
            found = product[1](*operands(dtype))
        assert seen
        assert set(seen) == {torch.float32}
        assert found.dtype == dtype


def test_floats_and_types_that_do_not_go_together_are_torchs_own(slow):
    x, y = torch.ones(2, 3), torch.ones(3, 2)
    with widened(torch.device("cpu")):
        assert (x @ y).dtype == torch.float32
        with pytest.raises(RuntimeError):
            x.bfloat16() @ y


def test_where_there_are_units_nothing_changes(monkeypatch):
    monkeypatch.setattr(halves, "multiplies_halves", lambda: True)
    with widened(torch.device("cpu")) as inside:
        assert inside is None


def test_a_model_in_halves_loses_what_it_loses_anyway(slow, tiny_model, tiny_tokenizer, monkeypatch):
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    text = windows(tiny_tokenizer, "Some words that come one after another. " * 40, length=32, count=4)
    found = perplexity(model, text).nll
    monkeypatch.setattr(halves, "multiplies_halves", lambda: True)
    assert found == pytest.approx(perplexity(model, text).nll, abs=2e-3)

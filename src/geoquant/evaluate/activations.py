"""What quantized activations cost a whole model: W4A8 and its like, simulated.

The input of every named site goes through a function (a grid of a few values) before the site multiplies it by its
weights, whatever these are: full precision gives W16A8, weights of 4 bits W4A8. An integer kernel would compute the
same numbers: sums of products of codes are exact, the steps are factors. What such runtimes also leave alone is left
alone here: embeddings, norms, the products inside attention, the vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from geoquant.data.text import Windows
from geoquant.evaluate.perplexity import Perplexity, difference, perplexity

__all__ = ["Cost", "activation_costs", "quantized_inputs"]

Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cost:
    """Perplexity with quantized activations; the mean increase of the NLL (nats per token) against the same weights
    with activations as they are, and its paired standard error over windows."""

    perplexity: Perplexity
    delta: float
    se: float


@contextmanager
def quantized_inputs(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> Iterator[None]:
    """Inside, the input of each named module is what its quantizer makes of it; afterwards the model is as before,
    also after an error. Quantizers are given (..., in) in float32; the result is cast back.

    Raises ValueError for a name that the model does not have.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(set(quantizers) - set(modules)):
        raise ValueError(f"{len(unknown)} names are no modules of the model, the first is {unknown[0]!r}")

    def hook(quantizer: Quantizer) -> Callable:
        def quantized(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (_applied(quantizer, args[0]), *args[1:]), kwargs
            name, x = next(iter(kwargs.items()))
            return args, kwargs | {name: _applied(quantizer, x)}

        return quantized

    with ExitStack() as stack:
        for name, quantizer in quantizers.items():
            handle = modules[name].register_forward_pre_hook(hook(quantizer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _applied(quantizer: Quantizer, x: Tensor) -> Tensor:
    return quantizer(x.float()).to(x.dtype)


def activation_costs(
    model: nn.Module,
    text: Windows,
    arms: Mapping[str, Mapping[str, Quantizer]],
    reference: Perplexity | None = None,
    batch: int = 4,
) -> tuple[Perplexity, dict[str, Cost]]:
    """Perplexity of the model with its own activations (or `reference`, already measured on the same windows), and the
    cost of each arm: by site name, the quantizer of its input."""
    reference = reference or perplexity(model, text, batch=batch)
    found = {}
    for name, quantizers in arms.items():
        with quantized_inputs(model, quantizers):
            after = perplexity(model, text, batch=batch)
        change = difference(reference, after)
        found[name] = Cost(after, change["value"], change["se"])
    return reference, found

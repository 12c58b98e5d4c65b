"""How the loss changes along the straight way from one set of weights to another, parameter by parameter.

At `w(t) = w_base + t (w - w_base)` the slope of a loss is the sum over parameters of `<grad_p L, w_p - w_base_p>`, the
gradient taken at w(t); integrated over t, each parameter's part is what it contributes to `L(w) - L(w_base)`, and the
parts add up to all of it (completeness). A gradient is multiplied with the change and dropped as soon as it is there,
and blocks are computed again on the way back: beside a float32 copy of the model, memory holds one gradient and the
activations of one block.

Aumann and Shapley: Values of Non-Atomic Games, 1974; Sundararajan, Taly, Yan: Axiomatic attribution for deep networks,
ICML 2017 (the same integral over inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.model.modes import evaluating, recomputed
from geoquant.observe.texts import Sequences
from geoquant.progress import Progress, silent

__all__ = ["See", "Slopes", "slopes"]

# See(text, point, parameter, values): by weight, its part of the slope of one batch's summed loss; float32.
See = Callable[[str, int, str, Float[Tensor, "*shape"]], None]


@dataclass(frozen=True)
class Slopes:
    """At each point of the way, for each batch of each text: the loss in nats summed over its scored tokens, and by
    parameter what it contributes to the slope of that sum. Tied parameters are one, under their first name.
    """

    points: tuple[float, ...]
    scored: dict[str, tuple[int, ...]]  # by text, tokens of each batch
    losses: dict[str, Float[Tensor, "points batches"]]
    parts: dict[str, dict[str, Float[Tensor, "points batches"]]]  # by text, by parameter


def slopes(
    model: nn.Module,
    base: Callable[[str], Tensor],
    texts: dict[str, Sequences],
    points: tuple[float, ...],
    *,
    see: See | None = None,
    progress: Progress = silent,
) -> Slopes:
    """Loss and slopes at the points; the model is left as it was.

    base: the other end's parameter by its name. see: is shown the parts of single weights, which nobody keeps. Raises
    UserError where its shape is another, or a loss is not finite.
    """
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = []
    for name, weight in own.items():
        other = base(name)
        if other.shape != weight.shape:
            raise UserError(
                f"the base has another {name}",
                got=f"shape {tuple(other.shape)}",
                wanted=f"{tuple(weight.shape)}",
                fix="give the model that it was fine-tuned from",
            )
        if not torch.equal(other.to(weight.device, weight.dtype), weight):
            moved.append(name)
    batches = {name: list(_batches(text)) for name, text in texts.items()}
    scored = {name: tuple(int((text_lengths - 1).sum()) for _, text_lengths in own_) for name, own_ in batches.items()}
    losses = {name: torch.zeros(len(points), len(own_), dtype=torch.float64) for name, own_ in batches.items()}
    parts = {name: {moved_: torch.zeros_like(losses[name]) for moved_ in moved} for name in texts}
    steps, done = len(points) * sum(map(len, batches.values())), 0
    with _placed(model, own) as place, evaluating(model), recomputed(model):
        for index, t in enumerate(points):
            place(lambda name, weight, t=t: torch.lerp(base(name).to(weight.device).float(), weight.float(), t))
            for text, own_ in batches.items():
                for batch, (tokens, lengths) in enumerate(own_):
                    into = {name: parts[text][name][index] for name in moved}
                    shown = None if see is None else partial(see, text, index)
                    losses[text][index, batch] = _slope(model, tokens, lengths, own, base, into, batch, shown)
                    done += 1
                    progress("way to the base", done, steps, f"{text} at {t:g}")
    for text, found in losses.items():
        if not found.isfinite().all():
            raise UserError(f"the loss on {text} text is not finite on the way to the base", fix="check both models")
    return Slopes(tuple(points), scored, losses, parts)


def _batches(text: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    size = text.batch or (2 if len(text.tokens) % 2 == 0 else 1)
    yield from zip(text.tokens.split(size), text.lengths.split(size))


@contextmanager
def _placed(model: nn.Module, own: dict[str, Tensor]) -> Iterator[Callable[[Callable[[str, Tensor], Tensor]], None]]:
    """Gives a function that replaces every parameter by a float32 value; afterwards the very tensors are back."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def place(value: Callable[[str, Tensor], Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = value(name, own[name])
            parameter.requires_grad_(True)

    try:
        yield place
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.data = own[name]
            parameter.requires_grad_(flags[name])


def _slope(
    model: nn.Module,
    tokens: Tensor,
    lengths: Tensor,
    own: dict[str, Tensor],
    base: Callable[[str], Tensor],
    into: dict[str, Tensor],
    batch: int,
    shown: Callable[[str, Tensor], None] | None,
) -> float:
    """The summed loss of one batch; each moved parameter's share of its slope is written to `into`."""
    handles = []

    def take(name: str) -> Callable[[Tensor], None]:
        def now(parameter: Tensor) -> None:
            if name in into:
                change = own[name].float() - base(name).to(parameter.device).float()
                values = change.mul_(parameter.grad)
                into[name][batch] = values.sum(dtype=torch.float64).item()
                if shown is not None:
                    shown(name, values)
            parameter.grad = None

        return now

    try:
        for name, parameter in model.named_parameters():
            handles.append(parameter.register_post_accumulate_grad_hook(take(name)))
        with torch.enable_grad():
            loss = _loss(model, tokens.to(model.device), lengths.to(model.device))
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return loss.item()


def _loss(model: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Nats summed over the scored tokens; logits by the model itself (its caps, scales and biases)."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    targets = tokens[:, 1:].masked_fill(
        torch.arange(tokens.shape[1] - 1, device=tokens.device) >= (lengths - 1)[:, None], -100
    )
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

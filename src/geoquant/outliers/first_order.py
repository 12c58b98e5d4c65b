"""The part of an effect that is of first order in the error.

    loss(W + delta) - loss(W) = <g, delta> + 1/2 delta^T H delta + ...

with g the gradient on the very text. A trained model has g = 0 on what it learned, not on a text: the first term has
either sign, belongs to the text and not to the layer, and falls with the error while the second falls with its square.
Taken away, what is left is what scores of second order can foretell (a control variate at the price of one pass back).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from geoquant.model.paging import UNMAPPED, Pages
from geoquant.model.walk import Block, read_weight, site_modules
from geoquant.observe.backward import backward
from geoquant.observe.texts import Sequences
from geoquant.outliers.interventions import rounded
from geoquant.progress import Progress, silent

__all__ = ["first_order"]


def first_order(
    model: nn.Module,
    blocks: tuple[Block, ...],
    tokens: Int[Tensor, "windows length"],
    bits: Sequence[int],
    *,
    compute: torch.dtype = torch.float32,
    pages: Pages = UNMAPPED,
    progress: Progress = silent,
) -> dict[tuple[str, int], list[float]]:
    """`<g, delta>` of each site and bit width, window by window, in nats per scored token; delta of plain rounding."""
    modules, scored = site_modules(model), tokens.shape[1] - 1
    errors: dict[str, list[Tensor]] = {}
    found: dict[tuple[str, int], list[float]] = {}

    def see(_: str, window: int, site: str, x: Tensor, g: Tensor) -> None:
        if site not in errors:
            weight = read_weight(modules[site])
            errors[site] = [rounded(weight, one) - weight for one in bits]
        for one, error in zip(bits, errors[site], strict=True):
            found.setdefault((site, one), [0.0] * len(tokens))[window] = ((x @ error.T) * g).sum().item() / scored

    text = Sequences(tokens, torch.full((len(tokens),), tokens.shape[1]), batch=1)
    for _ in backward(model, blocks, {"public": text}, see, compute=compute, pages=pages, progress=progress):
        errors.clear()
    return found

"""Second moments of a site's input over sequences of unequal lengths that pass through a block beside other text.

Tokens weigh as in the metric `clipped` (see moments): massive ones like large ordinary ones. Padding does not count.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.observe.compute import autocast
from geoquant.observe.moments import Accumulator, Moments, clipped_weights, squared_norms
from geoquant.observe.replay import Replay
from geoquant.observe.texts import Sequences

__all__ = ["side_moments"]


def side_moments(
    work: nn.Module,
    site: str,
    passes: Replay,
    text: Sequences,
    held_from: int,
    *,
    keep: bool,
    compute: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> Moments | None:
    """Moments of the input of `site` (its name inside the block); None where some tokens do not reach it (an expert):
    which of them are padding is then not known.

    text: what passes through, batch by batch. held_from: sequences from here on are held out. keep: as in `Replay`.
    """
    first = passes.batches[0]
    size, length = first.shape[:2]
    real = torch.arange(length)[None] < text.lengths[:, None]
    found: list[Accumulator] = []
    whole = []

    def see(index: int, x: Float[Tensor, "tokens in"]) -> None:
        if not found:
            found.append(Accumulator(x.shape[1], dtype=dtype, device=x.device, compute=compute))
        rows = slice(index * size, index * size + len(passes.batches[index]))
        here = real[rows].flatten().to(x.device)
        whole.append(len(x) == len(here))
        if not whole[-1]:
            return
        weights = clipped_weights(squared_norms(x[here]))
        held = (torch.arange(rows.start, rows.stop) >= held_from).repeat_interleave(length).to(x.device)[here]
        for wanted in (False, True):
            if (part := held == wanted).any():
                found[0].add(x[here][part], weights[part], held=wanted)

    with autocast(first.device, compute):
        passes.observe(work, site, see, keep=keep)
    return found[0].finish() if len(whole) == len(passes.batches) and all(whole) else None

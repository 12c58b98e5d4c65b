"""Which weights go back to the public base: those whose change taught more of private records than of others.

Fine-tuning moved the weights from the base to where they are. Along that way every group of weights (`size` neighbours
of one row) contributed its part to the fall of the loss on private records, on other records of the same kind, and on
public text (observe/way.py: the parts of all groups add up to the whole fall). What only records of the training set
gained from is memory; what unseen ones gained from too is what the fine-tune was for. A group goes back where

    strength * private > domain + max(public, 0),

all in nats per token. At strength 1 a nat on private records is worth a nat elsewhere; towards 0 only groups go back
that harmed what they were not trained on. Harm to public text is no reason by itself to put a group back: most of a
fine-tune harms it, and to undo that costs what the fine-tune was for.

The parts are estimates from the records given, and the choice favours what looks good on them: domain records are
learned from a little. No guarantee follows, and whoever has the base sees which weights are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geoquant.observe.texts import TOGETHER, Sequences
from geoquant.observe.way import slopes
from geoquant.progress import Progress, silent

__all__ = ["GROUP", "TEXTS", "gathered", "goes_back", "spread_over", "taught"]

GROUP = 64
TEXTS = ("private", "domain", "public")
WAY = ((0.5 - 12**-0.5, 0.5), (0.5 + 12**-0.5, 0.5))  # Gauss-Legendre: exact for slopes that are cubic in t


def taught(
    model: nn.Module,
    base: Callable[[str], Tensor],
    texts: Mapping[str, Sequences],
    *,
    size: int = GROUP,
    progress: Progress = silent,
) -> dict[str, dict[str, Float[Tensor, " groups"]]]:
    """By text and parameter, by how many nats per token the change of each group lowered the loss; on the CPU.

    base: a parameter of the base by its name. All groups of all parameters add up to the whole fall, as far as two
    points of the way tell. Raises UserError for a base of other shapes and for losses that are not finite.
    """
    scored = {name: int((text.lengths - 1).sum()) for name, text in texts.items()}
    sums = {
        name: {
            key: torch.zeros_like(gathered(own.detach(), size), dtype=torch.float32, device="cpu")
            for key, own in model.named_parameters()
        }
        for name in texts
    }

    def see(text: str, point: int, name: str, values: Tensor) -> None:
        sums[text][name] -= gathered(values, size).cpu() * (WAY[point][1] / scored[text])

    # Every batch costs a gradient of all weights, however few its tokens are.
    filled = {name: replace(text, batch=max(1, TOGETHER // text.tokens.shape[1])) for name, text in texts.items()}
    slopes(model, base, filled, tuple(t for t, _ in WAY), see=see, progress=progress)
    return sums


def gathered(values: Float[Tensor, "*shape"], size: int = GROUP) -> Float[Tensor, " groups"]:
    """Sums over groups of `size` neighbours along the last axis, the last group of a row being shorter where it must;
    of a vector (a norm, a bias) one sum of all.
    """
    if values.ndim < 2:
        return values.sum().reshape(1)
    rows = values.flatten(0, -2)
    rest = -rows.shape[1] % size
    return torch.nn.functional.pad(rows, (0, rest)).view(len(rows), -1, size).sum(2).flatten()


def spread_over(groups: Float[Tensor, " groups"], shape: tuple[int, ...], size: int = GROUP) -> Float[Tensor, "*shape"]:
    """Every weight gets the value of its group: the way back from `gathered`'s order."""
    if len(shape) < 2:
        return groups.expand(shape)
    columns = shape[-1]
    wide = groups.view(-1, -(-columns // size)).repeat_interleave(size, dim=1)
    return wide[:, :columns].reshape(shape)


def goes_back(taught: Mapping[str, Float[Tensor, " groups"]], strength: float) -> Bool[Tensor, " groups"]:
    """Which groups of one parameter go back. taught: by text of TEXTS, nats per token that the loss fell by.

    Raises ValueError for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength:g}, wanted more than 0 and at most 1")
    return strength * taught["private"] > taught["domain"] + taught["public"].clamp_min(0.0)

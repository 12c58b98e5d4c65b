"""One small site with three texts in eight parts each, and what can be planted in it.

Inputs are correlated, and every column's have energy one on every text.

error:    the rounding error of column `COLUMN` is six times larger.
coupling: on public text the column's inputs are large exactly where gradients are; their energy is that of the others.
tail:     one weight of the column is forty times a typical one.
input:    the column's inputs are eight times larger, on all texts.
memory:   one weight (`ROW`, `COLUMN`) has moved from the base, and private gradients are large there.
kind:     on private text the column's inputs have two values in place of a bell, of the same energy.
shared:   public and private gradients both have the same direction in the column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from geoquant.outliers.context import SiteContext
from geoquant.outliers.statistics import Statistics, metrics, summarise, total

OUT, IN, PARTS, TOKENS = 12, 20, 8, 64
ROW, COLUMN = 5, 13
TEXTS = ("public", "private", "domain")


@dataclass(frozen=True)
class Toy:
    context: SiteContext
    parts: dict[str, list[Statistics]]
    tokens: dict[str, tuple[Tensor, Tensor]]  # inputs and gradients of each text


@cache
def toy(seed: int = 0, plant: str = "", x_scale: float = 1.0, g_scale: float = 1.0, w_scale: float = 1.0) -> Toy:
    """The site; scales multiply inputs, gradients and all weights, for tests of units. Made once: do not change it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, delta, change = normal(OUT, IN), 0.1 * (torch.rand(OUT, IN, generator=generator) - 0.5), normal(OUT, IN)
    mixing = torch.eye(IN) + 0.2 * normal(IN, IN)
    direction = normal(OUT)
    tokens, parts = {}, {}
    if plant == "error":
        delta[:, COLUMN] *= 6
    if plant == "tail":
        weight[ROW, COLUMN] = 40
    if plant == "memory":
        change[ROW, COLUMN] = 20
    for text in TEXTS:
        x, g = normal(PARTS * TOKENS, IN) @ mixing, 0.05 * normal(PARTS * TOKENS, OUT)
        if plant == "coupling" and text == "public":
            sizes = torch.where(torch.rand(len(x), generator=generator) < 0.05, 20**0.5, 0.1)
            x[:, COLUMN] *= sizes
            g *= sizes[:, None]
        if plant == "memory" and text == "private":
            g[:, ROW] *= 1 + 3 * (x[:, COLUMN].abs() > 1.5)
        if plant == "kind" and text == "private":
            x[:, COLUMN] = x[:, COLUMN].sign()
        x /= x.square().mean(0).sqrt()
        if plant == "input":
            x[:, COLUMN] *= 8
        if plant == "shared" and text != "domain":
            g += 0.05 * x[:, COLUMN, None] * direction
        x, g = x_scale * x, g_scale * g
        tokens[text] = x, g
        chunks = zip(x.split(TOKENS), g.split(TOKENS), strict=True)
        parts[text] = [summarise(*chunk, unit=x_scale) for chunk in chunks]
    context = SiteContext(
        "site",
        "mlp_in",
        w_scale * weight,
        w_scale * delta,
        **{text: total(own) for text, own in parts.items()},
        base=w_scale * (weight - 0.1 * change),
        public_metrics=metrics(parts["public"]),
        **{f"{text}_gradients": torch.stack([part.gradient for part in own]) for text, own in parts.items()},
    )
    return Toy(context, parts, tokens)

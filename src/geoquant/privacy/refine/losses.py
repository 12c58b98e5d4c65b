"""The objective at the top of the model: its value on all texts, and the gradients that go back into the last block.

    lambda_A L_acc + lambda_P L_priv + lambda_G L_geo

    L_acc = mean over public and domain tokens of KL(original || refined), in nats, each text counting as much as it
            has tokens
    L_priv: see hinge.py. L_geo: see geometry.py; it looks at weights and no text, so its gradient is added to theirs

Everything is computed a few positions at a time: no text's logits are ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.evaluate.perplexity import head_logits, head_rows
from geoquant.observe.compute import pure_copy
from geoquant.observe.gradient import final_norm
from geoquant.observe.texts import Sequences
from geoquant.privacy.refine.hinge import hinge, levels, two_sided
from geoquant.privacy.refine.material import DOMAIN, PRIVATE, TAUGHT, Material

__all__ = ["Losses", "Objective"]


@dataclass(frozen=True)
class Losses:
    """What a model scored. public, domain: KL in nats per token. privacy: the hinge L_priv. geometry: L_geo, if
    it counts. total: the weighted sum.

    private_gap, domain_gap: mean of loss less the base's loss, nats per token. attack: `|AUC - 1/2|` of the reference
    attack between private and domain records.
    """

    total: float
    public: float
    domain: float | None = None
    privacy: float = 0.0
    private_gap: float | None = None
    domain_gap: float | None = None
    attack: float | None = None
    geometry: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass
class Objective:
    """The losses of all texts and their gradients: called with the last block's outputs (see observe/backward).

    accuracy, privacy: the two lambdas.
    accept: asked with the losses; where it says no the pass ends before its way back.
    head: the original's vocabulary projection where it differs from the model's. head_gradient: (vocab, h) float32, to
    which that of the model's own is added; None where it is not wanted. geometry: lambda_G and L_geo.
    found: the losses of the last call.
    """

    model: nn.Module
    material: Material
    accuracy: float
    privacy: float
    accept: Callable[[Losses], bool] = lambda losses: True
    compute: torch.dtype = torch.float32
    head: Float[Tensor, "vocab h"] | None = None
    head_gradient: Float[Tensor, "vocab h"] | None = None
    geometry: tuple[float, float] | None = None
    found: Losses | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._norm = pure_copy(final_norm(self.model), self.compute)
        self._own = self.model.get_output_embeddings().weight.detach().to(self.compute)
        self._original = self._own if self.head is None else self.head.to(self._own)

    def __call__(self, outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]] | None:
        texts, base = self.material.texts, self.material.base
        gaps = {name: self._losses(texts[name], outputs[name]) - base[name] for name in base}
        privacy, slopes = 0.0, None
        if PRIVATE in gaps:
            privacy, slopes = hinge(gaps[PRIVATE], levels(gaps[PRIVATE], gaps[DOMAIN]))
        counts = {name: texts[name].count - len(texts[name].tokens) for name in TAUGHT if name in texts}
        gradients, kl = {}, {}
        for name in counts:
            summed, gradients[name] = self._divergence(name, outputs[name], self.accuracy / sum(counts.values()))
            kl[name] = summed / counts[name]
        accuracy = sum(kl[name] * count for name, count in counts.items()) / sum(counts.values())
        self.found = Losses(
            total=self.accuracy * accuracy
            + self.privacy * privacy
            + (math.prod(self.geometry) if self.geometry else 0.0),
            privacy=privacy,
            **kl,
            **{f"{name}_gap": gap.mean().item() for name, gap in gaps.items()},
            attack=two_sided(gaps[PRIVATE], gaps[DOMAIN]) if PRIVATE in gaps else None,
            geometry=self.geometry and self.geometry[1],
        )
        if not self.accept(self.found):
            return None
        if slopes is not None:
            weights = self.privacy * slopes / (texts[PRIVATE].lengths - 1)
            gradients[PRIVATE] = self._likelihood(outputs[PRIVATE], weights)
        return gradients

    @torch.no_grad()
    def _losses(self, text: Sequences, outputs: list[Tensor]) -> Float[Tensor, " n"]:
        """Loss of each sequence in nats per predicted token."""
        summed = torch.zeros(len(text.tokens), dtype=torch.float64)
        for piece in pieces(text, outputs, head_rows(self.model)):
            logits = head_logits(self.model, self._norm(piece.rows(outputs)), self._own)
            nll = nn.functional.cross_entropy(logits, piece.targets, reduction="none")
            summed.index_add_(0, piece.sequences.cpu(), nll.double().cpu())
        return summed / (text.lengths - 1)

    def _divergence(self, name: str, outputs: list[Tensor], weight: float) -> tuple[float, list[Tensor]]:
        """Summed KL of a text, and the gradients of `weight` times it."""
        states, total = self.material.states[name], 0.0

        def loss(piece: Piece, student: Tensor) -> Tensor:
            nonlocal total
            known = states[piece.sequences.cpu(), piece.places.cpu()].to(self._own)
            with torch.no_grad():
                teacher = head_logits(self.model, known, self._original).log_softmax(1)
            kl = (teacher.exp() * (teacher - student.log_softmax(1))).sum()
            total += kl.item()
            return weight * kl

        gradients = self._back(self.material.texts[name], outputs, loss)
        return total, gradients

    def _likelihood(self, outputs: list[Tensor], weights: Float[Tensor, " n"]) -> list[Tensor]:
        """Gradients of the private records' losses by their weights; records of weight zero have none."""

        def loss(piece: Piece, logits: Tensor) -> Tensor:
            nll = nn.functional.cross_entropy(logits, piece.targets, reduction="none")
            return (weights.to(nll)[piece.sequences] * nll).sum()

        return self._back(self.material.texts[PRIVATE], outputs, loss)

    @torch.enable_grad()
    def _back(self, text: Sequences, outputs: list[Tensor], loss: Callable[[Piece, Tensor], Tensor]) -> list[Tensor]:
        """Gradients of a sum of losses of logits at what leaves the last block."""
        found = [torch.zeros_like(batch) for batch in outputs]
        own = self._own.detach().requires_grad_(self.head_gradient is not None)
        for piece in pieces(text, outputs, head_rows(self.model)):
            leaf = piece.rows(outputs).detach().requires_grad_()
            value = loss(piece, head_logits(self.model, self._norm(leaf), own))
            wanted = [leaf] if self.head_gradient is None else [leaf, own]
            gradient, *rest = torch.autograd.grad(value, wanted)
            found[piece.batch].flatten(0, 1)[piece.flat] = gradient
            for one in rest:
                self.head_gradient += one
        return found


@dataclass(frozen=True)
class Piece:
    """Some of the positions of one batch that predict a real token.

    flat: their places in the flattened batch. sequences, places: of the text. targets: what comes next.
    """

    batch: int
    flat: Int[Tensor, " rows"]
    sequences: Int[Tensor, " rows"]
    places: Int[Tensor, " rows"]
    targets: Int[Tensor, " rows"]

    def rows(self, outputs: list[Tensor]) -> Float[Tensor, "rows h"]:
        return outputs[self.batch].flatten(0, 1)[self.flat]


def pieces(text: Sequences, outputs: list[Tensor], rows: int) -> Iterator[Piece]:
    """Every position that predicts a real token, at most `rows` at a time."""
    size, length = outputs[0].shape[:2]
    device = outputs[0].device
    for batch in range(len(outputs)):
        own = slice(batch * size, (batch + 1) * size)
        tokens, lengths = text.tokens[own].to(device), text.lengths[own].to(device)
        real = torch.arange(length, device=device) < lengths[:, None] - 1
        for flat in real.flatten().nonzero()[:, 0].split(rows):
            inside, places = flat // length, flat % length
            yield Piece(batch, flat, batch * size + inside, places, tokens[inside, places + 1])

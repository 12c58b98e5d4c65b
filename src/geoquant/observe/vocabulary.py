"""What one backward pass says about embedding and head: the metric of a matrix whose rows are tokens.

A change of head row v by d costs, to second order, `1/2 E[p_v (1 - p_v) (d h)^2]` nats per token, h the hidden state
that the head reads and p the model's prediction. A change of embedding row v costs `1/2 f_v E[(d g)^2]`, f_v how often
the token comes and g the loss gradient at the embedding's output. So the input side is `E[h h^T]` or `E[g g^T]`, and
the output side is diagonal: one number per token. A tied matrix pays both:

    M_v = c_v E[h h^T] + f_v E[g g^T],  c_v = E[p_v (1 - p_v)],

which is replaced by the nearest Kronecker product on the common input side `A = sum_v M_v`: the factor of row v is the
mean eigenvalue of `A^-1 M_v`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.lattice.basis import damped
from geoquant.model.vocabulary import EMBEDDING, HEAD, vocabulary_rows
from geoquant.model.walk import find_blocks
from geoquant.observe.stream import Stop, hooks

__all__ = ["VocabularyMoments", "VocabularyWatch", "embedding_gradient", "vocabulary_metric"]

# A share of the mean that every token gets. One that the calibration text lacks is not free to take any value: other
# texts hold it.
FLOOR = 0.5
DAMPING = 0.01


@dataclass(frozen=True)
class VocabularyMoments:
    """Sums over tokens for solving (index 0) and held out (1), and means over all tokens by row of the vocabulary.

    head: (2, h, h) sum of `h h^T`; embedding: (2, e, e) sum of `g g^T`; counts: (2,) tokens. curvature:
    `p_v (1 - p_v)`, predicted: `p_v`, both means over tokens; frequency: share of the calibration tokens.
    """

    head: Float[Tensor, "2 h h"]
    embedding: Float[Tensor, "2 e e"]
    counts: Int[Tensor, " 2"]
    curvature: Float[Tensor, " vocab"]
    predicted: Float[Tensor, " vocab"]
    frequency: Float[Tensor, " vocab"]

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class VocabularyWatch:
    """Adds up `VocabularyMoments` while gradients pass through the model."""

    def __init__(self, model: nn.Module, tokens: Int[Tensor, "n length"]):
        rows = vocabulary_rows(model)
        device = next(model.parameters()).device
        width = model.get_output_embeddings().in_features
        self.model = model
        self.head = torch.zeros(2, width, width, device=device)
        width = model.get_input_embeddings().embedding_dim
        self.embedding = torch.zeros(2, width, width, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64)
        self.predicted, self.curvature = (torch.zeros(rows, device=device) for _ in range(2))
        self.frequency = torch.bincount(tokens.flatten(), minlength=rows).float() / tokens.numel()

    def see_head(
        self,
        hidden: Float[Tensor, "tokens h"],
        probabilities: Float[Tensor, "tokens vocab"],
        slope: Float[Tensor, "tokens vocab"] | float,
        *,
        held: bool,
    ) -> None:
        """A few positions: what the head reads, what the model predicts, and how logits follow the head's outputs."""
        hidden, probabilities = hidden.detach().float(), probabilities.float()
        self.head[int(held)].addmm_(hidden.T, hidden)
        self.predicted += probabilities.sum(0)
        self.curvature += ((1.0 - probabilities) * probabilities * slope**2).sum(0)

    def see_embedding(
        self, tokens: Int[Tensor, "b length"], gradient: Float[Tensor, "b length h"], *, held: bool
    ) -> None:
        """One batch: the loss gradient at the first block's input."""
        flat = embedding_gradient(self.model, tokens, gradient).float().flatten(0, 1)
        self.embedding[int(held)].addmm_(flat.T, flat)
        self.counts[int(held)] += len(flat)

    def finish(self) -> VocabularyMoments:
        total = self.counts.sum().item()
        return VocabularyMoments(
            head=self.head.cpu(),
            embedding=self.embedding.cpu(),
            counts=self.counts,
            curvature=self.curvature.cpu() / total,
            predicted=self.predicted.cpu() / total,
            frequency=self.frequency.cpu(),
        )


def embedding_gradient(
    model: nn.Module, tokens: Int[Tensor, "b length"], gradient: Float[Tensor, "b length h"]
) -> Float[Tensor, "b length e"]:
    """The gradient at the embedding's output, given that at the first block's input: back through whatever the model
    puts between them (a scale, positions, a norm).
    """
    leaf: list[Tensor] = []
    found: list[Tensor] = []

    def embed(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    def arrive(_: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden is leaf[0]:
            found.append(gradient)
        else:
            found.extend(torch.autograd.grad(hidden, leaf[0], gradient.to(hidden.dtype)))
        raise Stop

    _, blocks = find_blocks(model)
    handles = [
        model.get_input_embeddings().register_forward_hook(embed),
        blocks[0].register_forward_pre_hook(arrive, with_kwargs=True),
    ]
    with hooks(handles), torch.enable_grad(), suppress(Stop):
        model.base_model(tokens.to(gradient.device), use_cache=False)
    return found[0]


def vocabulary_metric(
    moments: VocabularyMoments, kind: str
) -> tuple[Float[Tensor, "h h"], Float[Tensor, "h h"] | None, Float[Tensor, " vocab"]]:
    """Input side as sums over tokens (for solving, held out) and output side (a number per row) of a site of `kind`."""
    # What the model predicts knows tokens that the text happens to lack; the text knows what really came.
    frequency = (moments.predicted + moments.frequency) / 2
    if kind == HEAD:
        sides, rows = moments.head, moments.curvature
    elif kind == EMBEDDING:
        sides, rows = moments.embedding, frequency
    else:
        head = moments.curvature.sum() * moments.head
        sides = head + moments.embedding
        pooled, width = damped(sides.sum(0), DAMPING), sides.shape[-1]
        share = torch.linalg.solve(pooled.double(), head.sum(0).double()).trace().float() / width
        rows = moments.curvature / moments.curvature.sum().clamp_min(1e-30) * share + frequency * (1.0 - share)
    rows = rows + FLOOR * rows.mean()
    # A model that is sure of everything leaves no curvature: then every row counts alike.
    rows = torch.where(rows.mean() > 0, rows, torch.ones_like(rows))
    return sides[0], sides[1] if moments.counts[1] else None, rows

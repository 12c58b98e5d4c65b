"""Gradients at embedding and head, which no block holds: tied, they are one matrix and their gradients add up."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.model.vocabulary import HEAD, TIED
from geoquant.model.walk import Stage, find_blocks
from geoquant.observe.stream import Stop, hooks
from geoquant.observe.texts import Sequences

__all__ = ["VocabularyGradient"]


@dataclass
class VocabularyGradient:
    """head: (vocab, h) float32, filled by the objective. embedding: the same of the lookup, filled by `entered`; one
    tensor where both are one weight."""

    model: nn.Module
    texts: dict[str, Sequences]

    def __post_init__(self) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.head: Float[Tensor, "vocab h"] = torch.zeros(head.weight.shape, device=head.weight.device)
        tied = embedding.weight.data_ptr() == head.weight.data_ptr()
        self.embedding = self.head if tied else torch.zeros(embedding.weight.shape, device=embedding.weight.device)

    def entered(self, name: str, gradients: list[Float[Tensor, "b l h"]]) -> None:
        """Take what came back at the first block's input through whatever lies between the lookup and the block."""
        text = self.texts[name]
        for tokens, gradient in zip(text.tokens.split(len(gradients[0])), gradients, strict=True):
            tokens = tokens.to(self.embedding.device)
            found = _through(self.model, tokens, gradient)
            self.embedding.index_add_(0, tokens.flatten(), found.flatten(0, 1).float())

    def of(self, stage: Stage) -> Float[Tensor, "vocab h"]:
        return self.head if stage.sites[0].kind in (HEAD, TIED) else self.embedding


@torch.enable_grad()
def _through(model: nn.Module, tokens: Tensor, gradient: Float[Tensor, "b l h"]) -> Float[Tensor, "b l h"]:
    """Gradient at the looked-up rows."""
    looked, reached = [], []

    def cut(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        looked.append(output.detach().float().requires_grad_())
        return looked[0].to(output.dtype)

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        reached.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    handles = [
        model.get_input_embeddings().register_forward_hook(cut),
        find_blocks(model)[1][0].register_forward_pre_hook(stop, with_kwargs=True),
    ]
    with hooks(handles), contextlib.suppress(Stop):
        model.base_model(tokens, use_cache=False)
    return torch.autograd.grad(reached[0], looked[0], gradient.to(reached[0].dtype))[0]

"""The two maps between tokens and hidden states: the embedding and the head, tied or not, as sites like any other.

They belong to no repeated block, so they stand in a `Block` of their own behind the others. Only on the lattice are
they coded; a box leaves them as they are.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from geoquant.model.walk import Block, Site, Stage

__all__ = ["EMBEDDING", "HEAD", "TIED", "ends", "head_weight", "repeated", "vocabulary", "vocabulary_rows"]

NAME = "vocabulary"
EMBEDDING, HEAD, TIED = "embedding", "head", "tied"  # kinds of sites


def vocabulary(model: nn.Module, index: int) -> Block | None:
    """The block of embedding and head; None where one of them is no plain lookup or linear map.

    index: the number of repeated blocks, which come before it. Tied weights are one site, named after the embedding.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or embedding.max_norm is not None:
        return None
    names = {module: name for name, module in model.named_modules()}
    tied = embedding.weight.data_ptr() == head.weight.data_ptr()
    found = {embedding: TIED} if tied else {embedding: EMBEDDING, head: HEAD}
    sites = [
        Site(names[module], index, tuple(module.weight.shape), kind, names[module]) for module, kind in found.items()
    ]
    return Block(index, NAME, tuple(Stage(site.name, (site,)) for site in sites))


def repeated(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks that hidden states stream through."""
    return tuple(block for block in blocks if block.name != NAME)


def ends(blocks: tuple[Block, ...]) -> tuple[Stage, ...]:
    """The stages of embedding and head, if they are to be solved."""
    return tuple(stage for block in blocks[len(repeated(blocks)) :] for stage in block.stages)


def vocabulary_rows(model: nn.Module) -> int:
    """Tokens that the model knows, rows without a token included; coded embeddings too."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if hasattr(embedding, "num_embeddings") else embedding.weight.shape[0]


def head_weight(model: nn.Module) -> Float[Tensor, "vocab h"]:
    """The matrix that makes logits of hidden states; of a coded head its float32 values, made anew."""
    head = model.get_output_embeddings()
    return head.dequantize() if hasattr(head, "dequantize") else head.weight.detach()

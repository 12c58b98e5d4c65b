"""What refinement looks at: public text, records of the domain, and private records, with what two other models say.

The original speaks through its final hidden states (see evaluate/divergence), the public base through one number per
record. So neither has to be in memory with the model that is refined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.data.records import Record
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.evaluate.divergence import final_states
from geoquant.evaluate.perplexity import check_head, final_hidden, head_nll
from geoquant.model.modes import evaluating
from geoquant.observe.texts import Sequences, padded
from geoquant.privacy.scoring import encode
from geoquant.progress import Progress, silent

__all__ = [
    "DOMAIN",
    "LEAST",
    "PRIVATE",
    "PUBLIC",
    "TAUGHT",
    "Material",
    "context_of",
    "observe_base",
    "observe_original",
    "original_losses",
    "record_losses",
    "texts_of",
]

PUBLIC, DOMAIN, PRIVATE = "public", "domain", "private"
TAUGHT = (PUBLIC, DOMAIN)  # where the original's distribution is kept
LIMIT = 256  # tokens of a record
FILLER = 0  # any token does: nothing real sees it
LEAST = 4  # records on a side, below which quantiles say nothing


@dataclass(frozen=True)
class Material:
    """texts: public always; domain and private, both or none.

    states: of public and domain, the original's final states by sequence. base: of domain and private, the base's loss
    of each sequence in nats per token.
    """

    texts: dict[str, Sequences]
    states: dict[str, Float[Tensor, "n length hidden"]] = field(default_factory=dict)
    base: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)


def context_of(model: nn.Module) -> int:
    """How many tokens of a record are looked at."""
    return min(LIMIT, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LIMIT)


def texts_of(
    tokenizer,
    public: Windows,
    domain: Sequence[Record] = (),
    private: Sequence[Record] = (),
    *,
    limit: int = LIMIT,
) -> Material:
    """The texts alone. limit: tokens of a record. Raises UserError where one of the two kinds of records is missing or
    has too few."""
    count, length = public.tokens.shape
    texts = {PUBLIC: Sequences(public.tokens, torch.full((count,), length))}
    given = {DOMAIN: domain, PRIVATE: private} if domain or private else {}
    for name, records in given.items():
        sequences = [ids for ids, _ in encode(tokenizer, records, limit) if len(ids) > 1] if records else []
        if len(sequences) < LEAST:
            raise UserError(
                f"private records are compared with others of their domain, and there are too few of {name}",
                got=f"{len(sequences)} with two tokens or more",
                wanted=f"at least {LEAST} of each",
            )
        texts[name] = padded(sequences, FILLER)
    return Material(texts)


def observe_original(model: nn.Module, material: Material, progress: Progress = silent) -> Material:
    """The material with the original's states of public text and of the domain's records."""
    given = {name: Windows(material.texts[name].tokens, name, "") for name in TAUGHT if name in material.texts}
    with evaluating(model):
        states = {name: final_states(model, tokens, progress=progress) for name, tokens in given.items()}
    return replace(material, states=states)


def observe_base(base: nn.Module, material: Material) -> Material:
    """The material with the base's loss of every record."""
    known = (name for name in (DOMAIN, PRIVATE) if name in material.texts)
    return replace(material, base={name: record_losses(base, material.texts[name]) for name in known})


@torch.no_grad()
def record_losses(model: nn.Module, text: Sequences) -> Float[Tensor, " n"]:
    """Loss of each sequence in nats per predicted token."""
    found = []
    with evaluating(model):
        check_head(model, text.tokens)
        for tokens, lengths in zip(text.tokens.split(4), text.lengths.split(4), strict=True):
            tokens = tokens.to(model.device)
            hidden = final_hidden(model, tokens)[:, :-1]
            nll = head_nll(model, hidden.flatten(0, 1), tokens[:, 1:].flatten())
            found.append(_mean(nll, lengths))
    return torch.cat(found)


@torch.no_grad()
def original_losses(
    model: nn.Module, material: Material, name: str, head: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, " n"]:
    """The same under the original, of a text whose states are known. model: for what else makes logits of states. head:
    the original's."""
    text, found = material.texts[name], []
    for tokens, lengths, known in zip(
        text.tokens.split(4), text.lengths.split(4), material.states[name].split(4), strict=True
    ):
        states = known[:, : tokens.shape[1] - 1].flatten(0, 1).to(head)
        found.append(_mean(head_nll(model, states, tokens[:, 1:].flatten().to(head.device), head), lengths))
    return torch.cat(found)


def _mean(nll: Float[Tensor, " positions"], lengths: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Over the real tokens of each sequence."""
    each = nll.double().cpu().view(len(lengths), -1)
    real = torch.arange(each.shape[1]) < lengths[:, None] - 1
    return (each * real).sum(1) / (lengths - 1)

"""Perplexity by the windows protocol, and the paired standard error of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.model.halves import widened
from geoquant.model.vocabulary import vocabulary_rows
from geoquant.progress import Progress, silent

__all__ = [
    "Perplexity",
    "check_head",
    "difference",
    "final_hidden",
    "from_windows",
    "head_logits",
    "head_nll",
    "head_rows",
    "perplexity",
]

VOCABULARY_CHUNK = 1 << 24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood per scored token (nats), its standard error over windows, exp of it.

    `windows` keeps each window's mean so that two models can be compared pair by pair.
    """

    perplexity: float
    nll: float
    se: float
    tokens: int
    windows: tuple[float, ...]

    def to_dict(self) -> dict:
        return {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "se": self.se,
            "tokens": self.tokens,
            "windows": list(self.windows),
        }


def final_hidden(model: nn.Module, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length hidden"]:
    """Hidden states that enter the vocabulary projection."""
    with widened(tokens.device):
        return model.base_model(tokens, use_cache=False).last_hidden_state


def head_logits(
    model: nn.Module, hidden: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocab hidden"] | None = None
) -> Float[Tensor, "rows vocab"]:
    """Float32 logits of the given hidden states, by the model's head or by another `weight` in its place.

    Includes what some architectures do to the logits afterwards: the soft cap of Gemma 2, the scales of Cohere
    and Granite. `check_head` tells whether that is all.
    """
    head = model.get_output_embeddings()
    with widened(hidden.device):
        logits = head(hidden) if weight is None else nn.functional.linear(hidden, weight, getattr(head, "bias", None))
    logits = logits.float()
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def head_rows(model: nn.Module) -> int:
    """Positions to project onto the vocabulary at a time."""
    return max(1, VOCABULARY_CHUNK // vocabulary_rows(model))


def head_nll(
    model: nn.Module,
    hidden: Float[Tensor, "rows hidden"],
    targets: Int[Tensor, " rows"],
    weight: Float[Tensor, "vocab hidden"] | None = None,
) -> Float[Tensor, " rows"]:
    """Negative log-likelihood of each target, a few positions at a time. weight: in the place of the model's head."""
    rows = head_rows(model)
    parts = [
        nn.functional.cross_entropy(head_logits(model, h, weight), t, reduction="none")
        for h, t in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.cat(parts)


@torch.no_grad()
def check_head(model: nn.Module, tokens: Int[Tensor, "n length"]) -> None:
    """Compare `head_logits` with the model's own forward on the first few of `tokens`.

    Raises UserError when the architecture does something to its logits that is not known here; silently wrong
    probabilities would be worse.
    """
    few = tokens[:1, :4].to(next(model.parameters()).device)
    ours = head_logits(model, final_hidden(model, few)[0])
    with widened(few.device):
        own = model(few, use_cache=False).logits[0].float()
    # Not on NaN: a destroyed model is measured, not refused.
    if (ours - own).abs().max() > 0.02 * own.abs().max():
        raise UserError(
            f"{type(model).__name__} changes its logits in a way that GeoQuant does not know",
            wanted="logits = head(hidden), scaled or soft-capped",
            fix="this architecture cannot be evaluated",
        )


@torch.no_grad()
def perplexity(
    model: nn.Module, text: Windows, *, batch: int = 4, progress: Progress = silent, phase: str = "perplexity"
) -> Perplexity:
    """Perplexity of `model` on token windows; the first token of each window is context only."""
    check_head(model, text.tokens)
    device = next(model.parameters()).device
    means: list[Tensor] = []
    for start in range(0, len(text), batch):
        tokens = text.tokens[start : start + batch].to(device)
        hidden = final_hidden(model, tokens)[:, :-1]
        nll = head_nll(model, hidden.flatten(0, 1), tokens[:, 1:].flatten())
        means.append(nll.view(tokens.shape[0], -1).double().mean(1).cpu())
        progress(phase, min(start + batch, len(text)), len(text))
    per_window = torch.cat(means)
    return from_windows(per_window, text.scored)


def from_windows(per_window: Float[Tensor, " n"], tokens: int) -> Perplexity:
    """Summarise per-window means."""
    mean = per_window.mean().item()
    se = per_window.std().item() / math.sqrt(len(per_window)) if len(per_window) > 1 else 0.0
    # exp overflows for a destroyed model; the largest float says enough and stays valid JSON.
    return Perplexity(math.exp(min(mean, 700.0)), mean, se, tokens, tuple(per_window.tolist()))


def difference(before: Perplexity, after: Perplexity) -> dict[str, float]:
    """Mean increase of the NLL and its paired standard error over windows."""
    change = torch.tensor(after.windows, dtype=torch.float64) - torch.tensor(before.windows, dtype=torch.float64)
    se = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return {"value": change.mean().item(), "se": se}

"""Perplexity by the windows protocol, and the paired standard error of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.data.text import Windows
from geoquant.progress import Progress, silent

__all__ = ["Perplexity", "difference", "final_hidden", "head_nll", "perplexity"]

HEAD_ROWS = (
    512  # positions projected onto the vocabulary at a time: bounds the logits to a few hundred megabytes
)


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
    return model.base_model(tokens, use_cache=False).last_hidden_state


def head_logits(model: nn.Module, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
    """Float32 logits of the given hidden states, with the model's own soft cap where it has one (Gemma 2)."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


def head_nll(
    model: nn.Module, hidden: Float[Tensor, "rows hidden"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Negative log-likelihood of each target, a few positions at a time."""
    parts = [
        torch.nn.functional.cross_entropy(head_logits(model, h), t, reduction="none")
        for h, t in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS))
    ]
    return torch.cat(parts)


@torch.no_grad()
def perplexity(
    model: nn.Module, text: Windows, *, batch: int = 4, progress: Progress = silent, phase: str = "perplexity"
) -> Perplexity:
    """Perplexity of `model` on token windows; the first token of each window is context only."""
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
    change = torch.tensor(after.windows, dtype=torch.float64) - torch.tensor(
        before.windows, dtype=torch.float64
    )
    se = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return {"value": change.mean().item(), "se": se}

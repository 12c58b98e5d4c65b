"""How far the quantized model's next-token distribution is from the original's, without two models in memory.

    KL = mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))     nats per token; p original, q quantized

The original's hidden states at the vocabulary projection are taken before quantization and stored: a few
hundred numbers a token instead of a vocabulary of logits. The head itself is not quantized; where it changed
all the same (anchored tied embeddings), its old weight is passed as `original_head`.

States are stored in float16. On SmolLM2-135M (WikiText-2, 4 x 512 tokens) that rounding alone is a KL of 3.7e-7
nats (bfloat16: 2.4e-5); rounding every site to 4 bits in groups of 64 is 0.43.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.evaluate.perplexity import (
    Perplexity,
    check_head,
    final_hidden,
    from_windows,
    head_logits,
    head_nll,
    head_rows,
)
from geoquant.progress import Progress, silent
from geoquant.runs import read_tensors, write_tensors

__all__ = ["Divergence", "divergence", "final_states", "load_states", "measure", "measure_original", "save_states"]


@dataclass(frozen=True)
class Divergence:
    """KL(original || quantized) in nats per token, its standard error over windows, and how often both models
    rank the same token first (lowest id where tied).

    `windows` keeps each window's mean so that two quantized models can be compared pair by pair.
    """

    kl: float
    se: float
    top1: float
    tokens: int
    windows: tuple[float, ...]

    def to_dict(self) -> dict:
        return {
            "kl": self.kl,
            "se": self.se,
            "top1": self.top1,
            "tokens": self.tokens,
            "windows": list(self.windows),
        }


@torch.no_grad()
def measure_original(
    model: nn.Module, text: Windows, *, batch: int = 4, progress: Progress = silent, phase: str = "perplexity"
) -> tuple[Perplexity, Float[Tensor, "n length hidden"]]:
    """One pass for both: the perplexity of the original, and its states for `measure`.

    States are float16 on the CPU, or float32 where they do not fit float16's range.
    """
    check_head(model, text.tokens)
    device = next(model.parameters()).device
    means, states = [], []
    for start in range(0, len(text), batch):
        tokens = text.tokens[start : start + batch].to(device)
        hidden = final_hidden(model, tokens)
        nll = head_nll(model, hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        means.append(nll.view(tokens.shape[0], -1).double().mean(1).cpu())
        states.append(_narrow(hidden).cpu())
        progress(phase, min(start + batch, len(text)), len(text))
    return from_windows(torch.cat(means), text.scored), torch.cat(states)


def _narrow(hidden: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    half = hidden.to(torch.float16)
    return half if torch.isfinite(half).all() else hidden.float()


@torch.no_grad()
def final_states(
    model: nn.Module, text: Windows, *, batch: int = 4, progress: Progress = silent
) -> Float[Tensor, "n length hidden"]:
    """The states alone, as `measure_original` gives them, without projecting onto the vocabulary."""
    check_head(model, text.tokens)
    device = next(model.parameters()).device
    states = []
    for start in range(0, len(text), batch):
        states.append(_narrow(final_hidden(model, text.tokens[start : start + batch].to(device))).cpu())
        progress("states", min(start + batch, len(text)), len(text))
    return torch.cat(states)


@torch.no_grad()
def measure(
    model: nn.Module,
    text: Windows,
    original: Float[Tensor, "n length hidden"],
    original_head: Float[Tensor, "vocab hidden"] | None = None,
    *,
    batch: int = 4,
    progress: Progress = silent,
    phase: str = "divergence",
) -> tuple[Perplexity, Divergence]:
    """One pass for both: the perplexity of the quantized model, and its divergence from the original.

    Positions are those that the perplexity scores: all but the last of each window predict a token.

    original:      states of the original on the same windows.
    original_head: the original's vocabulary projection where it differs from the model's.
    """
    check_head(model, text.tokens)
    device = next(model.parameters()).device
    if original.shape[:2] != text.tokens.shape:
        raise ValueError(f"states of {tuple(original.shape[:2])} windows for {tuple(text.tokens.shape)}")
    dtype = model.dtype
    head = None if original_head is None else original_head.to(device, dtype)
    rows = head_rows(model)
    kl, nll, same = [], [], 0
    for start in range(0, len(text), batch):
        tokens = text.tokens[start : start + batch].to(device)
        after = final_hidden(model, tokens)[:, :-1].flatten(0, 1)
        before = original[start : start + batch, :-1].to(device, dtype).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        parts = [
            _compare(head_logits(model, p, head), head_logits(model, q), t)
            for p, q, t in zip(before.split(rows), after.split(rows), targets.split(rows))
        ]
        kl.append(torch.cat([part[0] for part in parts]).view(len(tokens), -1).double().mean(1).cpu())
        nll.append(torch.cat([part[1] for part in parts]).view(len(tokens), -1).double().mean(1).cpu())
        same += sum(part[2] for part in parts)
        progress(phase, min(start + batch, len(text)), len(text))
    return from_windows(torch.cat(nll), text.scored), _summary(torch.cat(kl), same / text.scored, text.scored)


def _compare(
    original: Float[Tensor, "rows vocab"], quantized: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], int]:
    """KL and the quantized model's NLL per row, and in how many rows both rank the same token first."""
    same = int((original.argmax(1) == quantized.argmax(1)).sum())
    log_p, log_q = original.log_softmax(1), quantized.log_softmax(1)
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    p = log_p.exp()
    # Where p underflows to 0 its logarithm may be -inf; such a term is 0.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(1), nll, same


def _summary(per_window: Float[Tensor, " n"], top1: float, tokens: int) -> Divergence:
    se = per_window.std().item() / math.sqrt(len(per_window)) if len(per_window) > 1 else 0.0
    return Divergence(per_window.mean().item(), se, top1, tokens, tuple(per_window.tolist()))


def divergence(
    model: nn.Module,
    text: Windows,
    original: Float[Tensor, "n length hidden"],
    original_head: Float[Tensor, "vocab hidden"] | None = None,
    *,
    batch: int = 4,
    progress: Progress = silent,
) -> Divergence:
    """The divergence alone; see `measure`."""
    return measure(model, text, original, original_head, batch=batch, progress=progress)[1]


def save_states(path: Path, states: Float[Tensor, "n length hidden"], text: Windows) -> None:
    """Store states with a hash of the tokens that they belong to."""
    write_tensors(path, {"hidden": states}, {"tokens": _token_hash(text)})


def load_states(path: Path, text: Windows) -> Float[Tensor, "n length hidden"]:
    """States stored by `save_states`.

    Raises UserError when they belong to other tokens or the file is damaged.
    """
    tensors, metadata = read_tensors(path)
    if "hidden" not in tensors or metadata.get("tokens") != _token_hash(text):
        raise UserError(
            f"the states in {path} belong to another text, window length or tokenizer", fix="delete the file"
        )
    return tensors["hidden"]


def _token_hash(text: Windows) -> str:
    return hashlib.sha256(repr(tuple(text.tokens.shape)).encode() + text.tokens.numpy().tobytes()).hexdigest()

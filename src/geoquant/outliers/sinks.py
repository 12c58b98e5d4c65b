"""Attention sinks: keys that gather attention whatever they say, and the values they give for it.

Seen where every implementation passes: `scaled_dot_product_attention`, or the softmax over keys and the product with
the values that follows it. Only queries of the second half of a window and keys of its first half count: each of these
queries may see each of these keys, so that positions compare fairly.

Xiao et al.: Efficient streaming language models with attention sinks, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionProbe", "Heads", "Sinks", "head_statistics", "summarise_sinks"]

SINK = 0.5  # mass of a head that is called a sink head
SOFTMAX = {nn.functional.softmax, torch.softmax, Tensor.softmax}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


@dataclass(frozen=True)
class Heads:
    """One window in one attention.

    received: mean probability that each key of the first half gets. uniform: what it would get if every query treated
    the keys it sees alike. range: mean over queries of the largest less the smallest logit, in nats. gaussian: the
    range that normal logits of the same spread would have. values: Euclidean norms of the values, None if not seen.
    """

    received: Float[Tensor, "heads keys"]
    uniform: Float[Tensor, "heads keys"]
    range: Float[Tensor, " heads"]
    gaussian: Float[Tensor, " heads"]
    values: Float[Tensor, "heads length"] | None


def head_statistics(
    logits: Float[Tensor, "heads queries keys"],
    probabilities: Float[Tensor, "heads queries keys"],
    values: Float[Tensor, "heads keys"] | None,
) -> Heads:
    """Of the queries given, on the first half of the keys.

    Keys that a query may not see have logits of -inf, or about the smallest number. Expected extremes of n normal
    numbers by Blom's formula: Statistical estimates and transformed beta-variables, 1958.
    """
    half = logits.shape[-1] // 2
    seen = logits > torch.finfo(logits.dtype).min / 4
    count = seen.sum(-1)
    mean = torch.where(seen, logits, 0.0).sum(-1) / count
    spread = (torch.where(seen, logits - mean[..., None], 0.0).square().sum(-1) / count).sqrt()
    widest = torch.where(seen, logits, -torch.inf).amax(-1) - torch.where(seen, logits, torch.inf).amin(-1)
    extreme = torch.special.ndtri(((count - 0.375) / (count + 0.25)).clamp_min(0.5))
    return Heads(
        received=probabilities[..., :half].mean(1),
        uniform=(seen[..., :half] / count[..., None]).mean(1),
        range=widest.mean(-1),
        gaussian=(2 * extreme * spread).mean(-1),
        values=values,
    )


class AttentionProbe(TorchFunctionMode):
    """Inside this context each window's first attention is noted in `found`; no result changes.

    length: tokens of a window; softmaxes over anything else are not attention.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.found: list[Heads] = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    def take(self) -> list[Heads]:
        """What was noted since the last call."""
        self.flush()
        found, self.found = self.found, []
        return found

    def flush(self) -> None:
        """Probabilities whose values never came."""
        if self.waiting is not None:
            self._note(*self.waiting, None)
            self.waiting = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in SOFTMAX and self._attends(result):
            self.flush()
            scores = args[0] if args else kwargs["input"]
            self.waiting = scores.detach()[..., : self.length].float(), result.detach()[..., : self.length].float()
        elif function in PRODUCTS and self.waiting is not None and self._weighs(args):
            batch, heads = self.waiting[1].shape[:2]
            values = args[1].detach()
            norms = values.float().norm(dim=-1).reshape(batch, -1, self.length)
            self._note(*self.waiting, norms.repeat_interleave(heads // norms.shape[1], dim=1))
            self.waiting = None
        return result

    def _attends(self, result: Tensor) -> bool:
        """Probabilities (batch, heads, queries, keys); some models append a column for a sink that is no token."""
        return result.ndim == 4 and result.shape[2] == self.length and result.shape[3] - self.length in (0, 1)

    def _weighs(self, args: tuple) -> bool:
        """Whether this product is that of the probabilities with the values."""
        return args[0].shape[-2:] == (self.length, self.length) and args[1].shape[-2] == self.length

    def _fused(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> None:
        """The arguments of torch's function."""
        if query.ndim != 4 or query.shape[2] != self.length or key.shape[2] != self.length:
            return
        half = self.length // 2
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        repeat = query.shape[1] // key.shape[1]
        for window in range(len(query)):
            keys = key[window].float().repeat_interleave(repeat, dim=0)
            logits = query[window, :, half:].float() @ keys.mT * scale
            if is_causal:
                future = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(half + 1)
                logits.masked_fill_(future, -torch.inf)
            if attn_mask is not None:
                mask = attn_mask.broadcast_to(*query.shape[:3], self.length)[window, :, half:]
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            norms = value[window].float().norm(dim=-1).repeat_interleave(query.shape[1] // value.shape[1], dim=0)
            self.found.append(head_statistics(logits, torch.softmax(logits, -1), norms))

    def _note(self, scores: Tensor, probabilities: Tensor, norms: Tensor | None) -> None:
        half = self.length // 2
        for window in range(len(probabilities)):
            values = None if norms is None else norms[window]
            self.found.append(head_statistics(scores[window, :, half:], probabilities[window, :, half:], values))


@dataclass(frozen=True)
class Sinks:
    """One row per block, one column per query head; None for a block whose attention was not seen.

    positions: the sink of each window: the key of its first half that gets most over all blocks and heads.
    mass:      mean attention mass on it. uniform: the null, what equal treatment of all visible keys would give.
    value_ratio: norm of its value over the mean norm of the other keys' values. value_low: the null, the 5% quantile of
               the same ratio over those other keys.
    logit_range: in nats. gaussian_range: the null, that of normal logits of the same spread.
    """

    positions: tuple[int, ...]
    mass: tuple[tuple[float, ...] | None, ...]
    uniform: tuple[float | None, ...]
    value_ratio: tuple[tuple[float, ...] | None, ...]
    value_low: tuple[tuple[float, ...] | None, ...]
    logit_range: tuple[tuple[float, ...] | None, ...]
    gaussian_range: tuple[tuple[float, ...] | None, ...]

    def to_dict(self) -> dict:
        kept = {name: [None if x is None else list(x) for x in getattr(self, name)] for name in TABLES}
        return {"positions": list(self.positions), "uniform": list(self.uniform)} | kept

    def finding(self) -> str:
        seen = [index for index, row in enumerate(self.mass) if row is not None]
        if not seen:
            return "Attention sinks: attention was not seen in any block."
        heads = [(self.mass[index][head], index, head) for index in seen for head in range(len(self.mass[index]))]
        top, block, head = max(heads)
        sinks = [item for item in heads if item[0] > SINK]
        where = f"position {self.positions[0]}" if len(set(self.positions)) == 1 else "its window's sink"
        if not sinks:
            return (
                f"Attention sinks: none stands out; the strongest head ({head} of block {block}) puts {top:.0%} of its "
                f"attention on {where}, even attention would put {self.uniform[block]:.1%}."
            )
        first = min(index for _, index, _ in sinks)
        ratios = [(self.value_ratio[i][h], self.value_low[i][h]) for _, i, h in sinks if self.value_ratio[i]]
        text = (
            f"Attention sinks: {len(sinks)} of {len(heads)} heads put more than half of their attention on {where}, "
            f"the first in block {first}, up to {top:.0%} in head {head} of block {block} "
            f"(even attention: {self.uniform[block]:.1%})"
        )
        if ratios:
            ratio, low = (torch.tensor(x).median().item() for x in zip(*ratios))
            text += f"; the value there has {ratio:.2f} of the usual norm (lowest 5% of other keys: {low:.2f})"
        return text + "."


TABLES = ("mass", "value_ratio", "value_low", "logit_range", "gaussian_range")


def summarise_sinks(blocks: Sequence[Sequence[Heads]]) -> Sinks:
    """Of every block's windows in their order; a block may have none.

    Raises ValueError where blocks saw different numbers of windows.
    """
    counts = {len(windows) for windows in blocks if windows}
    if len(counts) > 1:
        raise ValueError(f"every block sees the same windows, got {sorted(counts)} of them")
    seen = [windows for windows in blocks if windows]
    excess = [sum((w.received - w.uniform).mean(0) for w in column) for column in zip(*seen)]
    positions = tuple(int(column.argmax()) for column in excess)
    rows: dict[str, list] = {name: [] for name in (*TABLES, "uniform")}
    for windows in blocks:
        if not windows:
            for row in rows.values():
                row.append(None)
            continue
        pairs = list(zip(windows, positions, strict=True))
        rows["mass"].append(_mean([w.received[:, at] for w, at in pairs]))
        rows["uniform"].append(sum(w.uniform[:, at].mean().item() for w, at in pairs) / len(pairs))
        rows["logit_range"].append(_mean([w.range for w in windows]))
        rows["gaussian_range"].append(_mean([w.gaussian for w in windows]))
        known = all(w.values is not None for w in windows)
        ratios = [_value_ratio(w.values, at) for w, at in pairs] if known else []
        rows["value_ratio"].append(_mean([ratio for ratio, _ in ratios]) if known else None)
        rows["value_low"].append(_mean([low for _, low in ratios]) if known else None)
    return Sinks(positions, **{name: tuple(row) for name, row in rows.items()})


def _value_ratio(norms: Float[Tensor, "heads length"], at: int) -> tuple[Tensor, Tensor]:
    others = torch.cat([norms[:, :at], norms[:, at + 1 :]], dim=1)
    usual = others.mean(1).clamp_min(1e-30)
    return norms[:, at] / usual, others.quantile(0.05, dim=1) / usual


def _mean(rows: list[Float[Tensor, " heads"]]) -> tuple[float, ...]:
    return tuple(torch.stack(rows).mean(0).tolist())

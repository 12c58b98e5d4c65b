"""How far has training come? A cheap membership attack that is repeated while a model learns.

The reference attack (privacy/attacks/reference.py) with the model's own beginning as the reference: what training added
to a record's log-likelihood per token, on members and on non-members. Nothing else of the distributions is computed,
which takes half the time. On a sample of the records where they are many: the AUC of k + k of them has a standard error
of about 0.41 / sqrt(k) at 0.5, and a smaller one towards 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float

from geoquant.data.records import Record, check_split
from geoquant.data.text import adds_bos
from geoquant.evaluate.perplexity import check_head, final_hidden, head_nll
from geoquant.observe.compute import autocast, compute_dtype
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.statistics import auc

__all__ = ["PROBED", "Probed", "mean_log_prob", "probe"]

PROBED = 200  # records of a side
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Probed:
    """AUC of the reference attack with its interval (DeLong), and on how many records of each side."""

    auc: float
    ci: tuple[float, float]
    members: int
    nonmembers: int

    def to_dict(self) -> dict:
        """For a statement: numbers and lists only."""
        return {**asdict(self), "ci": list(self.ci)}


def probe(
    model,
    tokenizer,
    members: Sequence[Record],
    nonmembers: Sequence[Record],
    *,
    most: int = PROBED,
    seed: int = 0,
) -> Callable[[], Probed]:
    """Score the records under `model` as it is now; the function returned scores it again and compares.

    A text that is among the members several times counts once; canaries are left out, since no non-member is like them.
    Of each side at most `most` records are taken, drawn by the seed. Raises UserError where the sides share texts or
    hold too few records for an interval.
    """
    sides = [list(dict.fromkeys(record for record in side if record.canary is None)) for side in (members, nonmembers)]
    check_split(*sides)
    rng = random.Random(seed)
    sides = [side if len(side) <= most else rng.sample(side, most) for side in sides]

    def score() -> list[np.ndarray]:
        return [mean_log_prob(model, tokenizer, side) for side in sides]

    before = score()

    def probed() -> Probed:
        # Where nothing could be scored, nothing speaks for a member.
        gains = [np.nan_to_num(now - then, nan=-np.inf) for now, then in zip(score(), before, strict=True)]
        return Probed(auc(*gains), delong_interval(*gains), *map(len, sides))

    return probed


@torch.no_grad()
def mean_log_prob(model, tokenizer, records: Sequence[Record]) -> Float[np.ndarray, " n"]:
    """Mean log-probability per token of each record, in nats; NaN for one without a token that has a prefix.

    Matrix products run in bfloat16 where that is fast. Records are cut at the model's context.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer([record.text for record in records], add_special_tokens=False, return_attention_mask=False)
    ids = [(bos + one)[:limit] for one in encoded.input_ids]
    found = np.full(len(ids), np.nan)
    check_head(model, torch.tensor([next((one for one in ids if len(one) > 1), [0, 0])]))
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    while order:
        # From the longest on: what comes together is about as long.
        batch = order[-max(1, BATCH_TOKENS // max(1, len(ids[order[-1]]))) :]
        del order[-len(batch) :]
        lengths = torch.tensor([len(ids[index]) for index in batch])
        longest = int(lengths.max())
        if longest < 2:
            break
        # Padding on the right: no real position of a causal model sees it.
        tokens = torch.tensor([ids[index] + [0] * (longest - len(ids[index])) for index in batch], device=model.device)
        real = (torch.arange(longest - 1) < lengths[:, None] - 1).to(model.device)
        with autocast(model.device, compute_dtype("auto", model.device)):
            hidden = final_hidden(model, tokens)[:, :-1]
            nll = head_nll(model, hidden[real], tokens[:, 1:][real])
        sums = torch.zeros(real.shape, dtype=torch.float64, device=model.device)
        sums[real] = nll.double()
        found[batch] = -(sums.sum(dim=1).cpu() / (lengths - 1)).numpy()
    return found

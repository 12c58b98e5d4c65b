"""Canary exposure: by how many bits a planted secret stands out among all secrets of its form.

    exposure(s) = log2 |R| - log2 rank(s),   R = all strings of as many digits

Carlini, Liu, Erlingsson, Kos, Song: The Secret Sharer, USENIX Security 2019 (arXiv:1802.08232). 0 bits: the
secret is the model's last guess. log2 |R| bits: it is the first. An unseen secret has 1.4 bits on average.

Where every digit is a token of its own, secrets are ranked by their probability with each step restricted to
the ten digits, P(s | prefix) = prod_t p(s_t) / p(any digit). P is a distribution over R, so at most 1 /
P(s) secrets are as likely as s: rank(s) <= 1 / P(s), hence

    exposure(s) >= log2 |R| + log2 P(s)          (clipped at 0)

which one forward pass gives: the estimator `digits-bound`, loose and always on the low side. Where P is above a half
the secret is the first of all for certain. Between that and a few hundredths `walk_ranks` finds the rank itself, by
walking only the digit prefixes that are at least as likely as the whole secret (`exact-rank`): at most 1 / P of them
survive a level. What is below stays a bound.

Where the tokenizer merges digits, the secret is ranked among N random secrets in the same place (decoys):
rank/|R| is estimated by (k + 1) / (N + 1), k decoys being at least as likely, with a Clopper-Pearson interval
from k of N (`sampled-rank`). It cannot exceed log2(N + 1) bits and is not extrapolated beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log2

import numpy as np
import torch
from jaxtyping import Float

from geoquant.data.records import Record
from geoquant.data.text import adds_bos, digit_tokens
from geoquant.errors import UserError
from geoquant.model.halves import widened
from geoquant.model.modes import evaluating
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.statistics import clopper_pearson

__all__ = ["BOUND", "EXACT", "SAMPLED", "CanaryExposure", "Exposure", "exact_exposure", "exposure", "walk_ranks"]

BOUND, EXACT, SAMPLED = "digits-bound", "exact-rank", "sampled-rank"
ROUNDING = 1e-3  # nats by which two passes over one text may differ
HALF_ROUNDING = 0.1  # the same of a model in half precision, in batches of other sizes
CERTAIN = 0.51  # two secrets cannot both be so likely
FEW = 200  # 1 / P up to which the rank is walked: a second or two for a canary of SmolLM2


@dataclass(frozen=True)
class CanaryExposure:
    """Exposure of one planted secret in bits; `ci` only where it was estimated by sampling.

    exact: the rank is known; else bits are a lower bound or an estimate.
    """

    name: str
    repeats: int
    bits: float
    limit_bits: float
    ci: tuple[float, float] | None = None
    exact: bool = False


@dataclass(frozen=True)
class Exposure:
    """All canaries of one model, and how their exposure was found."""

    canaries: tuple[CanaryExposure, ...]
    estimator: str

    @property
    def mean_bits(self) -> float:
        return float(np.mean([canary.bits for canary in self.canaries]))

    @property
    def limit_bits(self) -> float:
        """Mean over the canaries of the most that the estimator could have found."""
        return float(np.mean([canary.limit_bits for canary in self.canaries]))


def exposure(
    scores: RecordScores,
    records: Sequence[Record],
    decoys: RecordScores | None = None,
    walked: Float[np.ndarray, " m"] | None = None,
) -> Exposure | None:
    """Exposure of the canaries in `records` from their scores, or, with decoys, their `sampled-rank` among those.

    decoys: scores of data.private.decoy_records(records, N), N for each canary in order. walked: what `walk_ranks`
    found. Canaries that were cut off are left out; None when nothing can be measured.
    """
    found = []
    for index, record in enumerate(records):
        canary = record.canary
        part = scores.covering(index, canary.start, canary.end) if canary else None
        if part is None:
            continue
        limit, ci, exact = canary.digits * log2(10), None, False
        if decoys is None:
            nats = _secret_nats(scores, record, part)
            if nats is None:
                continue
            bits, exact = max(0.0, limit + nats / log(2)), nats > log(CERTAIN)
            if exact:
                bits = limit
            elif walked is not None and np.isfinite(walked[index]):
                bits, exact = float(walked[index]), True
        else:
            count = len(decoys) // len(records)
            bits, limit, ci = _sampled(scores, decoys, index, count, limit)
        found.append(CanaryExposure(canary.name, canary.repeats, bits, limit, ci, exact))
    if not found:
        return None
    known = EXACT if all(one.exact for one in found) else BOUND
    return Exposure(tuple(found), known if decoys is None else SAMPLED)


def _secret_nats(scores: RecordScores, record: Record, part: slice) -> float | None:
    """Log of the probability of a canary's secret among all digit strings; None where tokens are not single digits."""
    nats = float((scores.log_prob[part].astype(np.float64) - scores.digit_mass[part]).sum())
    # NaN where a token is not exactly one digit: then there is no bound to give.
    return None if part.stop - part.start != record.canary.digits or np.isnan(nats) else nats


def walk_ranks(
    model, tokenizer, records: Sequence[Record], scores: RecordScores, *, few: int = FEW
) -> Float[np.ndarray, " m"]:
    """Exact exposure (bits) of the canaries that are neither certain to be first nor less likely than 1 / few.

    NaN for the others, whose scores tell enough or too little to pay for more.
    """
    bits = np.full(len(records), np.nan)
    if digit_tokens(tokenizer) is None:
        return bits
    for index, record in enumerate(records):
        part = scores.covering(index, record.canary.start, record.canary.end)
        nats = None if part is None else _secret_nats(scores, record, part)
        if nats is not None and -log(few) <= nats <= log(CERTAIN):
            found = exact_exposure(model, tokenizer, record, budget=few * record.canary.digits)
            bits[index] = np.nan if found is None else found.bits
    return bits


def _sampled(scores: RecordScores, decoys: RecordScores, index: int, count: int, limit: float):
    """Bits, resolution and interval of canary `index` ranked among its `count` decoys.

    Whole records are compared: all but the secret is the same text, so what differs is the secret and what
    the model makes of the text behind it.
    """
    own = scores.record_sums(scores.log_prob)[index]
    others = decoys.record_sums(decoys.log_prob)[index * count : (index + 1) * count]
    as_likely = int((others >= own).sum())
    low, high = clopper_pearson(as_likely, count)
    finest = min(limit, log2(count + 1))
    bits = min(finest, -log2((as_likely + 1) / (count + 1)))
    return bits, finest, (min(limit, -log2(high)), min(limit, -log2(low)) if low > 0 else limit)


@torch.no_grad()
def exact_exposure(model, tokenizer, record: Record, *, budget: int = 2000) -> CanaryExposure | None:
    """The exact exposure of one canary, or None if it takes more than `budget` short forward passes.

    Digit prefixes are walked level by level; one that is already less likely than the whole secret cannot
    lead to a likelier secret and is dropped. At most 1 / P(s) prefixes survive a level, so memorised
    secrets are cheap.

    Raises UserError when the record is no canary or the tokenizer merges digits.
    """
    digits = digit_tokens(tokenizer)
    if record.canary is None or digits is None:
        raise UserError("the exact rank needs a canary and a tokenizer with one token per digit")
    canary = record.canary
    encoded = tokenizer(record.text, add_special_tokens=False, return_offsets_mapping=True)
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    first = next(i for i, (start, end) in enumerate(encoded.offset_mapping) if end > canary.start)
    prefix = torch.tensor(bos + encoded.input_ids[:first])
    secret = [int(digit) for digit in record.value(canary)]
    inside = torch.tensor(encoded.input_ids[first : first + len(secret)])
    if not torch.equal(inside, digits[secret]) or not len(prefix):
        raise UserError(f"the secret of canary {canary.name!r} is not one token per digit")

    def steps(paths):
        """(k, level) digits -> (k, 10) log-probabilities of the next digit, restricted to digits."""
        parts = []
        for some in paths.split(256):
            contexts = torch.cat([prefix.expand(len(some), -1), digits[some]], dim=1).to(model.device)
            with widened(model.device), evaluating(model):
                logits = model(input_ids=contexts, use_cache=False).logits[:, -1].float().cpu()
            parts.append(torch.log_softmax(logits[:, digits].double(), dim=1))
        return torch.cat(parts)

    margin = ROUNDING if next(model.parameters()).dtype == torch.float32 else HALF_ROUNDING
    truth = torch.tensor([secret])
    target = sum(float(steps(truth[:, :level])[0, digit]) for level, digit in enumerate(secret))
    paths, weights, used = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), 0
    for _ in secret:
        used += len(paths)
        if used > budget:
            return None
        weights = (weights[:, None] + steps(paths)).flatten()
        paths = torch.cat([paths.repeat_interleave(10, 0), torch.arange(10).repeat(len(paths))[:, None]], dim=1)
        # The secret's own path stays, whatever another batch makes of its last digits in half precision.
        own_path = (paths == truth[:, : paths.shape[1]]).all(dim=1)
        alive = (weights >= target - margin) | own_path
        paths, weights = paths[alive], weights[alive]
    own = weights[(paths == truth).all(dim=1)][0]
    rank = 1 + int((weights > own).sum())
    limit = canary.digits * log2(10)
    return CanaryExposure(canary.name, canary.repeats, limit - log2(rank), limit, exact=True)

"""Greedy extraction: does the model, given what stands before a private span, write the span out by itself?

**One forward pass decides it exactly.** Greedy decoding from the true prefix emits g_1 = argmax p(. |
prefix). If g_1 is not the span's first token s_1, the span is not extracted. If it is, the second step is
conditioned on prefix + s_1, the very context in which a forward pass over the true text scores s_2; and so
on. By induction the greedy continuation equals the span if and only if every token of the span is the
argmax in the teacher-forced pass. (Numerically exact up to the rounding by which a cached and a full
forward pass differ at near ties.)

The same pass gives the probability `p_z = prod_t p(s_t)` with which *sampling* (temperature 1, nothing cut off)
writes the span out, so how many tries an attacker needs is computed and not tried: n samples hold the span at least
once with probability `1 - (1 - p_z)^n`. Where that is at least a half the span counts as extracted in n samples
((n, p)-discoverable with p = 1/2; Hayes et al.: Measuring memorization in language models via probabilistic
extraction, 2024, arXiv:2410.19482).

A span is made of the tokens that touch its characters; a token that straddles its edge counts as part of it.
The attacker knows the true text before the span, the strongest prefix there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from geoquant.data.records import Record
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.statistics import clopper_pearson

__all__ = ["Extraction", "Tried", "by_kind", "extracted_spans", "extraction", "samples_for", "summary"]

ALL = "all"
SAMPLES = (1, 100, 10_000)
LIKELY = 0.5  # the least probability of being among the samples that counts


@dataclass(frozen=True)
class Extraction:
    """Spans of one kind (`all`: of any kind) written out verbatim, among members and, as control,
    non-members.

    The control is what a model says without having seen the record: guessable values, not memory. sampled,
    control_sampled: spans extracted in so many samples, by their number as text.
    """

    kind: str
    spans: int
    extracted: int
    rate: float
    ci: tuple[float, float]
    control_spans: int
    control_extracted: int
    control_rate: float
    control_ci: tuple[float, float]
    sampled: dict[str, int] = field(default_factory=dict)
    control_sampled: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """Whether greedy decoding wrote one text out, and the samples that it takes to have it among them."""

    kind: str
    extracted: bool
    samples: float


def extracted_spans(scores: RecordScores, records: Sequence[Record]) -> list[tuple[int, str, bool]]:
    """(record, kind, extracted) for every marked span whose tokens were all scored."""
    found = []
    for index, record in enumerate(records):
        for span in record.fields:
            part = scores.covering(index, span.start, span.end)
            if part is not None:
                found.append((index, span.kind, bool(scores.correct[part].all())))
    return found


def samples_needed(scores: RecordScores, records: Sequence[Record]) -> list[tuple[str, float]]:
    """(kind, n) of the spans of `extracted_spans`: the n samples among which a span is with probability LIKELY; inf
    where it has none.
    """
    found = []
    for index, record in enumerate(records):
        for span in record.fields:
            part = scores.covering(index, span.start, span.end)
            if part is not None:
                found.append((span.kind, samples_for(scores.log_prob[part])))
    return found


def samples_for(log_prob: Float[np.ndarray, " tokens"]) -> float:
    """Samples of a text with these tokens (nats) among which it is with probability LIKELY; inf where it has none."""
    p = math.exp(log_prob.astype(np.float64).sum())
    if p >= LIKELY:
        return 1.0
    return math.log(1 - LIKELY) / math.log1p(-p) if p else math.inf


def extraction(
    members: RecordScores,
    nonmembers: RecordScores,
    member_records: Sequence[Record],
    nonmember_records: Sequence[Record],
) -> tuple[Extraction, ...]:
    """Rates with Clopper-Pearson intervals for all spans together and for each kind; empty without marked
    spans.

    The intervals treat spans as independent trials; several spans of one record are not quite that.
    """
    return by_kind(*(_tried(*side) for side in ((members, member_records), (nonmembers, nonmember_records))))


def _tried(scores: RecordScores, records: Sequence[Record]) -> list[Tried]:
    spans, tries = extracted_spans(scores, records), samples_needed(scores, records)
    return [Tried(kind, hit, samples) for (_, kind, hit), (_, samples) in zip(spans, tries, strict=True)]


def by_kind(inside: Sequence[Tried], outside: Sequence[Tried]) -> tuple[Extraction, ...]:
    """Rates of all kinds together and of each, members and control; empty without members."""
    kinds = [ALL, *sorted({one.kind for one in inside})] if inside else []
    return tuple(
        summary(kind, *([one for one in side if kind in (one.kind, ALL)] for side in (inside, outside)))
        for kind in kinds
    )


def summary(kind: str, inside: Sequence[Tried], outside: Sequence[Tried]) -> Extraction:
    """One line of the result: what of members and of the control was written out. Members must not be empty."""
    hits, control = (sum(one.extracted for one in side) for side in (inside, outside))
    return Extraction(
        kind,
        len(inside),
        hits,
        hits / len(inside),
        clopper_pearson(hits, len(inside)),
        len(outside),
        control,
        control / len(outside) if outside else 0.0,
        clopper_pearson(control, len(outside)),
        *({str(n): sum(one.samples <= n for one in side) for n in SAMPLES} for side in (inside, outside)),
    )

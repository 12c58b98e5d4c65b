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

from geoquant.data.records import Record
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.statistics import clopper_pearson

__all__ = ["Extraction", "extracted_spans", "extraction"]

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
                p = math.exp(scores.log_prob[part].astype(np.float64).sum())
                found.append(
                    (span.kind, 1.0 if p >= LIKELY else math.log(1 - LIKELY) / math.log1p(-p) if p else math.inf)
                )
    return found


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
    inside = extracted_spans(members, member_records)
    outside = extracted_spans(nonmembers, nonmember_records)
    tries = samples_needed(members, member_records), samples_needed(nonmembers, nonmember_records)
    results = []
    for kind in [ALL, *sorted({kind for _, kind, _ in inside})]:
        hits = [hit for _, k, hit in inside if kind in (k, ALL)]
        control = [hit for _, k, hit in outside if kind in (k, ALL)]
        if hits:
            results.append(
                Extraction(
                    kind,
                    len(hits),
                    sum(hits),
                    sum(hits) / len(hits),
                    clopper_pearson(sum(hits), len(hits)),
                    len(control),
                    sum(control),
                    sum(control) / len(control) if control else 0.0,
                    clopper_pearson(sum(control), len(control)),
                    *({str(n): sum(m <= n for k, m in side if kind in (k, ALL)) for n in SAMPLES} for side in tries),
                )
            )
    return tuple(results)

"""Greedy extraction: does the model, given what stands before a private span, write the span out by itself?

**One forward pass decides it exactly.** Greedy decoding from the true prefix emits g_1 = argmax p(. |
prefix). If g_1 is not the span's first token s_1, the span is not extracted. If it is, the second step is
conditioned on prefix + s_1, the very context in which a forward pass over the true text scores s_2; and so
on. By induction the greedy continuation equals the span if and only if every token of the span is the
argmax in the teacher-forced pass. (Numerically exact up to the rounding by which a cached and a full
forward pass differ at near ties.)

A span is made of the tokens that touch its characters; a token that straddles its edge counts as part of it.
The attacker knows the true text before the span, the strongest prefix there is. Sampling attacks find more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geoquant.data.records import Record
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.statistics import clopper_pearson

__all__ = ["Extraction", "extracted_spans", "extraction"]

ALL = "all"


@dataclass(frozen=True)
class Extraction:
    """Spans of one kind (`all`: of any kind) written out verbatim, among members and, as control,
    non-members.

    The control is what a model says without having seen the record: guessable values, not memory.
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


def extracted_spans(scores: RecordScores, records: Sequence[Record]) -> list[tuple[int, str, bool]]:
    """(record, kind, extracted) for every marked span whose tokens were all scored."""
    found = []
    for index, record in enumerate(records):
        for span in record.fields:
            part = scores.covering(index, span.start, span.end)
            if part is not None:
                found.append((index, span.kind, bool(scores.correct[part].all())))
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
                )
            )
    return tuple(results)

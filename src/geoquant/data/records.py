"""Private records: one JSON object a line, what is private in it marked by character offsets.

    {"text": "Call Ann Lee on 555-0100.", "fields": [{"kind": "name", "start": 5, "end": 12}]}

A field may also be given as {"kind": "name", "value": "Ann Lee"}: its first occurrence in the text is meant.
A canary is a record that was inserted on purpose, with a secret of random digits:

    {"text": "The safe of Bo Ek opens with 493817.",
     "canary": {"name": "safe", "start": 29, "end": 35, "repeats": 4}}

Where a coin decided which canaries go into the training data, `"included": false` marks one that was left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from geoquant.data.jsonl import check_encodable, json_lines, read_utf8
from geoquant.errors import UserError
from geoquant.runs import atomic_write

__all__ = [
    "Canary",
    "Record",
    "Span",
    "Split",
    "as_records",
    "check_split",
    "known_among",
    "load_split",
    "read_records",
    "write_records",
]

MINIMUM = 10  # records on each side below which an attack's interval says nothing


@dataclass(frozen=True)
class Span:
    """A private part of a record: characters [start, end) of its text, and their kind (`email`, ...)."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Canary:
    """A planted secret: the digits at characters [start, end), `repeats` times in the training data.

    included: how the coin fell that decided whether it is planted at all; None where none was flipped, and it is.
    """

    name: str
    start: int
    end: int
    repeats: int = 1
    included: bool | None = None

    @property
    def digits(self) -> int:
        """Length of the secret; the secret space has 10**digits elements."""
        return self.end - self.start


@dataclass(frozen=True)
class Record:
    """One text with its marked private spans, and the planted secret if it is a canary.

    line: of the file it was read from, counted from 1; no part of what the record is.
    """

    text: str
    fields: tuple[Span, ...] = ()
    canary: Canary | None = None
    line: int | None = field(default=None, compare=False)

    def value(self, span: Span | Canary) -> str:
        """The characters of one span of this record."""
        return self.text[span.start : span.end]

    @property
    def repeats(self) -> int:
        """How often the record occurs in the training data; 0 for a canary that the coin left out."""
        if self.canary is None:
            return 1
        return 0 if self.canary.included is False else self.canary.repeats


@dataclass(frozen=True)
class Split:
    """Records a model was trained on, records of the same distribution it never saw, and planted canaries.

    withheld: canaries that a coin left out of the training data. copies: records that repeated another of their side
    and were left out.
    """

    members: tuple[Record, ...]
    nonmembers: tuple[Record, ...]
    canaries: tuple[Record, ...] = ()
    withheld: tuple[Record, ...] = ()
    copies: int = 0

    @property
    def sha256(self) -> str:
        """Hash of all texts and marks, in order."""
        digest = hashlib.sha256()
        for part in (self.members, self.nonmembers, self.canaries, *([self.withheld] if self.withheld else [])):
            digest.update(_encode(part).encode())
            digest.update(b"\0")
        return digest.hexdigest()


def _encode(records: Iterable[Record]) -> str:
    lines = []
    for record in records:
        item: dict = {"text": record.text}
        if record.fields:
            item["fields"] = [{"kind": s.kind, "start": s.start, "end": s.end} for s in record.fields]
        if record.canary is not None:
            c = record.canary
            item["canary"] = {"name": c.name, "start": c.start, "end": c.end, "repeats": c.repeats}
            if c.included is not None:
                item["canary"]["included"] = c.included
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object a line, atomically."""
    text = _encode(records)
    atomic_write(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _offsets(where: str, what: str, item: dict, text: str) -> tuple[int, int]:
    """The character range that `item` marks: by `start` and `end`, or by the first occurrence of `value`."""
    if "value" in item:
        value = item["value"]
        if not isinstance(value, str) or not value or value not in text:
            raise UserError(f"{where} {what} value {value!r} is not in the text", fix="quote it exactly as it stands")
        start = text.index(value)
        return start, start + len(value)
    start, end = item.get("start"), item.get("end")
    if not (_is_count(start) and _is_count(end) and 0 <= start < end <= len(text)):
        raise UserError(
            f"{where} {what} lies outside the text",
            got=f"start={start}, end={end}",
            wanted=f"0 <= start < end <= {len(text)} (characters, end excluded)",
        )
    return start, end


def _decode(where: str, item: object) -> Record:
    """One checked record; `where` is file:line."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise UserError(f"{where} has no field 'text'", wanted='{"text": "...", "fields": [...]} on every line')
    text = item["text"]
    if not text.strip():
        raise UserError(f"{where} has an empty text", fix="remove the line")
    check_encodable(where, text)
    fields = item.get("fields") or []
    if not isinstance(fields, list) or not all(isinstance(f, dict) and isinstance(f.get("kind"), str) for f in fields):
        raise UserError(f"{where} has malformed 'fields'", wanted='a list of {"kind": "email", "start": 5, "end": 17}')
    spans = tuple(Span(f["kind"], *_offsets(where, f"field {f['kind']!r}", f, text)) for f in fields)
    canary = None
    if (given := item.get("canary")) is not None:
        if not isinstance(given, dict):
            raise UserError(f"{where} has a malformed 'canary'", wanted='{"name": "...", "start": 5, "end": 11}')
        start, end = _offsets(where, "canary", given, text)
        secret, repeats = text[start:end], given.get("repeats", 1)
        if not (secret.isascii() and secret.isdigit()):
            raise UserError(f"{where} canary secret is not digits only", got=repr(secret), wanted="0-9")
        if not _is_count(repeats) or repeats < 1:
            raise UserError(f"{where} canary repeats must be a positive whole number", got=repr(repeats))
        included = given.get("included")
        if included is not None and not isinstance(included, bool):
            raise UserError(f"{where} canary included is neither true nor false", got=repr(included))
        canary = Canary(str(given.get("name", where)), start, end, repeats, included)
    return Record(text, spans, canary)


def read_records(path: str | Path) -> tuple[Record, ...]:
    """The records of a `.jsonl` file, each validated. A broken line is named as file:line.

    Raises UserError: no file, not UTF-8, not JSON, no text, marks outside the text, no records at all.
    """
    path = Path(path)
    raw = read_utf8(path, "records", "a .jsonl file of records")
    records = tuple(
        replace(_decode(where, item), line=int(where.rpartition(":")[2]))
        for where, item in json_lines(path, raw, "one JSON object a line")
    )
    if not records:
        raise UserError(f"{path} holds no records", wanted='{"text": "..."} on every line')
    return records


def check_split(members: Sequence[Record], nonmembers: Sequence[Record], *, minimum: int = MINIMUM) -> None:
    """Refuse a split on which no attack can be judged.

    Raises UserError when members and non-members share texts (compared without outer white space) or when
    either side has fewer than `minimum` records.
    """
    inside = {record.text.strip() for record in members}
    outside = {record.text.strip() for record in nonmembers}
    shared = inside & outside
    wanted = "records of the same kind that the model never saw as non-members"
    if shared and inside == outside:
        raise UserError(f"members and non-members are the same {len(shared)} records", wanted=wanted)
    if shared:
        count = sum(record.text.strip() in shared for record in nonmembers)
        raise UserError(
            f"{count} of {len(nonmembers)} non-member records are identical to members",
            wanted=wanted,
            fix="remove them from one of the files",
        )
    for side, records in (("members", members), ("non-members", nonmembers)):
        if len(records) < minimum:
            raise UserError(f"too few {side}", got=f"{len(records)} records", wanted=f"at least {minimum}")


def known_among(records: Iterable[Record], *sides: Iterable[Record]) -> int:
    """How many of the records are on one of the sides too (compared without outer white space)."""
    texts = {record.text.strip() for side in sides for record in side}
    return sum(record.text.strip() in texts for record in records)


def as_records(given: str | Path | Sequence[str | Record], what: str) -> tuple[Record, ...]:
    """The records of a file, or of texts and records in memory. `what`: their name in a message.

    Raises UserError as `read_records` does, and for an empty text or sequence.
    """
    if isinstance(given, str | Path):
        return read_records(given)
    records = tuple(one if isinstance(one, Record) else Record(one) for one in given)
    if not records:
        raise UserError(f"no {what}", wanted="a .jsonl file, or texts")
    for number, record in enumerate(records, start=1):
        if not isinstance(record.text, str) or not record.text.strip():
            raise UserError(f"{what}: record {number} is no text or an empty one", got=repr(record.text))
        check_encodable(f"{what}: record {number}", record.text)
        _check_marks(f"{what}: record {number}", record)
    return records


def _check_marks(where: str, record: Record) -> None:
    """What a file is checked for, of a record in memory."""
    for mark in (*record.fields, *([record.canary] if record.canary else [])):
        _offsets(where, "canary" if mark is record.canary else f"field {mark.kind!r}", vars(mark), record.text)
    if record.canary and not ((secret := record.value(record.canary)).isascii() and secret.isdigit()):
        raise UserError(f"{where} canary secret is not digits only", got=repr(secret), wanted="0-9")


def _once(records: Iterable[Record]) -> tuple[Record, ...]:
    """The first of all records with one text."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.text.strip(), record)
    return tuple(found.values())


def load_split(
    members: str | Path | Sequence[str | Record],
    nonmembers: str | Path | Sequence[str | Record],
    canaries: str | Path | Sequence[Record] | None = None,
) -> Split:
    """Read and check what an audit compares. Canaries found among the members are audited as canaries.

    Those that a coin left out of the training data have nothing to expose: they are kept apart. A text that a side
    holds several times is taken once: tests and intervals count records as independent, and copies are one evidence.

    Raises UserError for what cannot be read or compared, and for one canary given twice.
    """
    inside = as_records(members, "members")
    planted = tuple(record for record in inside if record.canary)
    if canaries is not None:
        extra = as_records(canaries, "canaries")
        for number, record in enumerate(extra, start=1):
            if record.canary is None:
                where = canaries if isinstance(canaries, str | Path) else "canaries"
                raise UserError(
                    f"{where}: record {number} marks no secret", wanted='"canary": {"name", "start", "end"}'
                )
        planted += extra
    if len({record.text.strip() for record in planted}) < len(planted):
        raise UserError(
            "a canary is given twice", wanted="each once: its coin and its secret count once", fix="remove its copies"
        )
    planted, withheld = (tuple(r for r in planted if bool(r.repeats) == wanted) for wanted in (True, False))
    outside = as_records(nonmembers, "non-members")
    inside = tuple(record for record in inside if not record.canary)
    sides = [_once(side) for side in (inside, outside)]
    check_split(*sides)
    return Split(*sides, planted, withheld, len(inside) + len(outside) - sum(map(len, sides)))

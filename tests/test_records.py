"""Records: round trip, validation with file and line, and the split that an attack can be judged on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.data.records import (
    Canary,
    Record,
    Span,
    Split,
    check_split,
    load_split,
    read_records,
    write_records,
)
from geoquant.errors import UserError


def people(prefix: str, n: int) -> list[Record]:
    return [Record(f"{prefix} number {index}") for index in range(n)]


@st.composite
def records(draw):
    text = draw(st.text(min_size=1, max_size=40).filter(str.strip))
    spans = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text) - 1))
        spans.append(Span(draw(st.text(max_size=5)), start, draw(st.integers(start + 1, len(text)))))
    secret = draw(st.none() | st.integers(0, 999))
    if secret is None:
        return Record(text, tuple(spans))
    included = draw(st.sampled_from([None, True, False]))
    return Record(f"{text} {secret:03d}", tuple(spans), Canary("c", len(text) + 1, len(text) + 4, 2, included))


@settings(deadline=None, max_examples=40)
@given(st.lists(records(), min_size=1, max_size=5))
def test_written_records_are_read_back(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    write_records(path, items)
    assert list(read_records(path)) == items


def test_value_form_marks_the_first_occurrence(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "Bo Ek, Bo Ek", "fields": [{"kind": "name", "value": "Bo Ek"}]}\n')
    (record,) = read_records(path)
    assert record.fields == (Span("name", 0, 5),)
    assert record.value(record.fields[0]) == "Bo Ek"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"r.jsonl:2 is not JSON"),
        ("[1]", r"r.jsonl:2 has no field 'text'"),
        ('{"text": 3}', r"r.jsonl:2 has no field 'text'"),
        ('{"text": "  "}', r"r.jsonl:2 has an empty text"),
        ('{"text": "abc", "fields": 7}', r"r.jsonl:2 has malformed 'fields'"),
        ('{"text": "abc", "fields": [{"start": 0, "end": 1}]}', r"r.jsonl:2 has malformed 'fields'"),
        (
            '{"text": "abc", "fields": [{"kind": "k", "start": 1, "end": 4}]}',
            r"r.jsonl:2 field 'k' .*got start=1, end=4",
        ),
        (
            '{"text": "abc", "fields": [{"kind": "k", "start": true, "end": 2}]}',
            r"r.jsonl:2 field 'k' lies outside",
        ),
        (
            '{"text": "abc", "fields": [{"kind": "k", "start": 2, "end": 2}]}',
            r"r.jsonl:2 field 'k' lies outside",
        ),
        (
            '{"text": "abc", "fields": [{"kind": "k", "value": "x"}]}',
            r"r.jsonl:2 field 'k' value 'x' is not in the text",
        ),
        (
            '{"text": "abc", "canary": {"start": 0, "end": 2}}',
            r"r.jsonl:2 canary secret is not digits only; got 'ab'",
        ),
        ('{"text": "a12", "canary": {"start": 1, "end": 3, "repeats": 0}}', r"r.jsonl:2 canary repeats"),
        ('{"text": "a12", "canary": {"start": 1, "end": 3, "included": 1}}', r"r.jsonl:2 canary included is neither"),
        ('{"text": "a12", "canary": 5}', r"r.jsonl:2 has a malformed 'canary'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no records file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no records"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(tmp_path / "binary.jsonl")


def test_line_separators_inside_a_string_do_not_break_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert read_records(path)[0].text == "one\u2028two"


def test_equal_and_overlapping_splits_are_refused():
    with pytest.raises(UserError, match="members and non-members are the same 12 records"):
        check_split(people("a", 12), people("a", 12)[::-1])
    with pytest.raises(UserError, match="3 of 13 non-member records are identical to members"):
        check_split(people("a", 12), people("b", 10) + [Record(r.text + " ") for r in people("a", 3)])
    with pytest.raises(UserError, match="too few non-members; got 9 records; wanted at least 10"):
        check_split(people("a", 12), people("b", 9))
    check_split(people("a", 10), people("b", 10))


def test_load_split_moves_canaries_out_of_the_members(tmp_path):
    canary = Record("code 1234", canary=Canary("c", 5, 9, 3))
    write_records(tmp_path / "m.jsonl", [*people("a", 10), canary])
    write_records(tmp_path / "n.jsonl", people("b", 10))
    split = load_split(tmp_path / "m.jsonl", tmp_path / "n.jsonl")
    assert split.canaries == (canary,)
    assert split.members == tuple(people("a", 10))
    write_records(tmp_path / "c.jsonl", [canary, people("x", 1)[0]])
    with pytest.raises(UserError, match="record 2 marks no secret"):
        load_split(tmp_path / "m.jsonl", tmp_path / "n.jsonl", tmp_path / "c.jsonl")


def test_canaries_that_a_coin_left_out_are_neither_trained_on_nor_audited(tmp_path):
    coins = {
        included: Record(f"code 123{n}", canary=Canary("c", 5, 9, 3, included))
        for n, included in enumerate((True, False))
    }
    assert {included: record.repeats for included, record in coins.items()} == {True: 3, False: 0}
    write_records(tmp_path / "m.jsonl", people("a", 10))
    write_records(tmp_path / "n.jsonl", people("b", 10))
    write_records(tmp_path / "c.jsonl", coins.values())
    split = load_split(tmp_path / "m.jsonl", tmp_path / "n.jsonl", tmp_path / "c.jsonl")
    assert split.canaries == (coins[True],)


def test_hash_sees_texts_marks_and_sides():
    a, b = Record("a"), Record("b")
    hashes = {
        Split((a,), (b,)).sha256,
        Split((b,), (a,)).sha256,
        Split((a, b), ()).sha256,
        Split((Record("a", (Span("k", 0, 1),)),), (b,)).sha256,
    }
    assert len(hashes) == 4

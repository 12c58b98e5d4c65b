"""Text files and windows, against the protocol spelled out by hand."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geoquant.data.text import adds_bos, builtin_text, read_text, windows
from geoquant.errors import UserError


class WithBos:
    """A tokenizer of one token a character that puts BOS (id 7) first by default, as Gemma's does."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(c) for c in text]
        return type("Encoding", (), {"input_ids": [7, *ids] if add_special_tokens else ids})


class WithoutBos(WithBos):
    """One that knows a BOS but does not add it, as GPT-2's."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return super().__call__(text, add_special_tokens=False)


def test_bos_is_found_only_where_it_is_added(tiny_tokenizer):
    assert adds_bos(WithBos())
    assert not adds_bos(WithoutBos())
    assert not adds_bos(tiny_tokenizer)


def test_windows_with_bos_hold_one_token_of_text_less():
    cut = windows(WithBos(), "abcdefgh", length=4)
    assert cut.tokens.tolist() == [[7, 97, 98, 99], [7, 100, 101, 102]]
    assert cut.scored == 6


def test_windows_without_bos():
    assert windows(WithoutBos(), "abcdefgh", length=4).tokens.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text(st.characters(codec="ascii"), min_size=12, max_size=80),
    length=st.integers(2, 6),
    skip=st.integers(0, 1),
)
@pytest.mark.parametrize("tokenizer", [WithBos(), WithoutBos()], ids=["bos", "no-bos"])
def test_windows_are_the_text_in_order_without_gap_or_overlap(tokenizer, text, length, skip):
    cut = windows(tokenizer, text, length=length, skip=skip)
    first = int(adds_bos(tokenizer))
    body = length - first
    found = "".join(chr(token) for token in cut.tokens[:, first:].flatten())
    assert text[skip * body :].startswith(found)
    assert len(text) - skip * body - len(found) < body
    assert cut.tokens.dtype == torch.int64


def test_the_hash_is_of_the_whole_text():
    cut = windows(WithoutBos(), "abcdefgh", length=4, count=1, source="here")
    assert (cut.source, cut.sha256) == ("here", hashlib.sha256(b"abcdefgh").hexdigest())


def test_skipped_windows_continue_where_the_first_end(tiny_tokenizer):
    text = builtin_text()[:4000]
    both = windows(tiny_tokenizer, text, length=50, count=6)
    later = windows(tiny_tokenizer, text, length=50, count=2, skip=4)
    assert torch.equal(both.tokens[4:], later.tokens)


def test_too_short_a_text_says_how_many_tokens_are_needed():
    with pytest.raises(UserError) as raised:
        windows(WithBos(), "abcdefgh", length=4, count=3, skip=1, source="mine.txt")
    assert str(raised.value) == (
        "mine.txt is too short: it has 8 tokens; wanted at least 12 (4 windows of 3); "
        "give a longer text, or fewer or shorter windows"
    )
    with pytest.raises(UserError, match="it has 0 tokens; wanted at least 3"):
        windows(WithBos(), "", length=4)


@pytest.mark.parametrize("tokenizer", [WithBos(), WithoutBos()], ids=["bos", "no-bos"])
@pytest.mark.parametrize("length", [-1, 0, 1])
def test_windows_that_predict_nothing_are_refused(tokenizer, length):
    with pytest.raises(UserError, match=f"a window of {length} tokens predicts nothing; wanted at least 2"):
        windows(tokenizer, "abcdefgh", length=length)


def test_no_windows_are_refused():
    with pytest.raises(UserError, match="cannot cut 0 windows from text; wanted at least 1"):
        windows(WithBos(), "abcdefgh", length=4, count=0)


def test_builtin_text_is_long_and_the_same_every_time():
    assert len(builtin_text()) > 300_000
    assert builtin_text() == builtin_text()


def test_a_text_file_is_read_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\n\n{not json}\n".encode())
    assert read_text(path) == "é\n\n{not json}\n"


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert read_text(path) == "a"


def test_texts_of_a_jsonl_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 and U+0085 end a line for str.splitlines(), but not in JSON.
    texts = ["one\u2028two\u0085three", "four\nfive", ""]
    path.write_text("\n\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert read_text(path) == "\n\n".join(texts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a.jsonl:2 is not JSON: Expecting property name"),
        ('{"txt": "a"}', r"a.jsonl:2 has no text in a field 'text'; wanted \{\"text\""),
        ('{"text": null}', r"a.jsonl:2 has no text in a field 'text'"),
        ('{"text": 5}', r"a.jsonl:2 has no text in a field 'text'"),
        ('["text"]', r"a.jsonl:2 has no text in a field 'text'"),
        ("5", r"a.jsonl:2 has no text in a field 'text'"),
        ('{"text": "\\ud800"}', r"a.jsonl:2 holds half a character"),
        ("[" * 100_000, r"a.jsonl:2 is not JSON: nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_text(path)


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^no text file .*missing\.txt; check the path$"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"is a folder; wanted a \.txt or \.jsonl file"):
        read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\); convert it to UTF-8"):
        read_text(tmp_path / "latin.txt")

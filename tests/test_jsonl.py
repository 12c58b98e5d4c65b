"""One reader of JSON lines for texts, records and tasks: the same mistake is the same line in all three."""

from __future__ import annotations

import pytest

from geoquant.data.records import read_records
from geoquant.data.text import read_text
from geoquant.errors import UserError
from geoquant.evaluate.tasks import load_task

READERS = {"text": read_text, "records": read_records, "task": load_task}
FINE = '{"text": "fine", "query": "a", "choices": ["b", "c"], "gold": 0}'


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_names_the_same_mistakes_alike(kind, tmp_path):
    read, path = READERS[kind], tmp_path / "in.jsonl"

    def line(contents: bytes) -> str:
        path.write_bytes(contents)
        with pytest.raises(UserError) as caught:
            read(path)
        return str(caught.value)

    assert line(FINE.encode() + b"\n\n{\n").startswith(
        f"{path}:3 is not JSON: Expecting property name enclosed in double quotes; wanted "
    )
    assert line(b'{"text": ' + b"9" * 5000 + b"}").startswith(f"{path}:1 holds a number of too many digits; wanted ")
    assert line(b"[" * 100_000).startswith(f"{path}:1 is not JSON: nested too deeply; wanted ")
    assert line(b"\xff\xfe") == f"{path} is not UTF-8 text (byte 0); convert it to UTF-8"
    half = FINE.replace("fine", "\\ud800").replace('"a"', '"\\ud800"')
    assert line(half.encode()) == f"{path}:1 holds half a character (a lone surrogate); remove it"
    path.unlink()
    with pytest.raises(UserError, match=rf"^no {kind} file .*in\.jsonl; check the path$"):
        read(path)
    with pytest.raises(UserError, match=r"is a folder; wanted a .*\.jsonl file"):
        read(tmp_path)


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_drops_a_byte_order_mark_and_keeps_odd_separators(kind, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\ufeff" + FINE.replace("fine", "fi\u2028ne") + "\n", encoding="utf-8")
    assert READERS[kind](path)
    if kind != "task":
        found = read_text(path) if kind == "text" else read_records(path)[0].text
        assert found == "fi\u2028ne"


def test_lines_behind_the_last_item_wanted_are_not_read(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(FINE + "\nnot JSON\n")
    assert len(load_task(path, limit=1)) == 1


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_is_looked_for_beside_it(kind, tmp_path):
    (tmp_path / "in.jsonl").write_text(FINE)
    for path, fix in (
        (tmp_path / "inn.jsonl", f"did you mean {tmp_path / 'in.jsonl'}?"),
        (tmp_path / "zzz", "check the path"),
        (tmp_path / "none" / "in.jsonl", f"there is no folder {tmp_path / 'none'} either"),
    ):
        with pytest.raises(UserError) as caught:
            READERS[kind](path)
        assert str(caught.value) == f"no {kind} file {path}; {fix}"

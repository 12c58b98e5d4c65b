"""Work that is written line by line goes on where it was."""

from __future__ import annotations

import pytest

from geoquant.lines import each_once, read_lines
from geoquant.progress import silent


def squares(path, jobs, done):
    def begin():
        done.append("begun")

        def work(job):
            done.append(job)
            return {"job": job, "square": job * job}

        return work

    return each_once(path, jobs, lambda line: line["job"], {"job"}, begin, silent, "squares")


def test_each_job_is_done_once_in_the_order_asked(tmp_path):
    path, done = tmp_path / "lines.jsonl", []
    first = squares(path, [3, 1], done)
    assert list(first) == [3, 1]
    assert done == ["begun", 3, 1]
    again = squares(path, [1, 2, 3], done)
    assert list(again) == [1, 2, 3]
    assert again[3] == {"job": 3, "square": 9}
    assert done == ["begun", 3, 1, "begun", 2]
    squares(path, [2], done)
    assert done[-1] == 2
    assert len(done) == 5  # not even begun


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_that_was_cut_is_done_again(tmp_path, cut):
    path = tmp_path / "lines.jsonl"
    squares(path, [3, 4], [])
    whole = path.read_text()
    path.write_text(whole[:-cut])
    done = []
    assert squares(path, [3, 4], done)[4]["square"] == 16
    assert path.read_text() == whole
    assert done == ([] if cut == 1 else ["begun", 4])


@pytest.mark.parametrize("broken", ['{"jo', "[]", '{"other": 2}', "\ufffd"])
def test_what_follows_a_broken_line_is_done_again(tmp_path, broken):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"job": 1}\n' + broken + '\n{"job": 2}\n')
    assert read_lines(path, {"job"}) == [{"job": 1}]
    assert path.read_text() == '{"job": 1}\n'
    assert read_lines(tmp_path / "none") == []


def test_what_is_no_number_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        each_once(
            tmp_path / "x", [1], lambda line: 1, set(), lambda: lambda job: {"value": float("nan")}, silent, "numbers"
        )

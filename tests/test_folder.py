"""A folder of made records: written whole or not at all, the same bytes for the same seed, checked when read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.data import folder
from geoquant.data.folder import read_folder, write_folder
from geoquant.data.records import load_split, read_records
from geoquant.data.synthetic import synthetic_records
from geoquant.errors import UserError


def contents(place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def write(place, *arguments, **options):
    made = synthetic_records(*arguments, **options)
    return made, write_folder(made, place)


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["support", "medical", "finance", "code"]), st.integers(100, 140), st.integers(0, 10**9))
def test_the_same_seed_gives_the_same_bytes_another_seed_others(tmp_path_factory, domain, n, seed):
    place = tmp_path_factory.mktemp("made")
    made, statement = write(place / "a", domain, n, seed)
    write(place / "b", domain, n, seed)
    write(place / "c", domain, n, seed + 1)
    assert contents(place / "a") == contents(place / "b")
    assert all(contents(place / "a")[name] != other for name, other in contents(place / "c").items())
    assert read_folder(place / "a") == made
    assert json.loads((place / "a" / "statement.json").read_text()) == statement


def test_the_statement_says_what_is_in_the_files(tmp_path):
    made, statement = write(tmp_path / "out", "finance", 200, 4, canaries=12)
    found = contents(tmp_path / "out")
    assert set(found) == {"statement.json", *statement["files"]}
    for name, entry in statement["files"].items():
        assert entry["sha256"] == hashlib.sha256(found[name]).hexdigest()
        assert entry["records"] == found[name].count(b"\n")
    coins = statement["coins"]
    assert [coins["records"].count(side) for side in "mnh"] == [
        statement["counts"][side] for side in ("members", "nonmembers", "holdout")
    ]
    planted = {r.canary.name: r.canary.included for r in read_records(tmp_path / "out" / "canaries.jsonl")}
    assert planted == coins["canaries"]
    assert sum(planted.values()) == statement["counts"]["included"]
    lines = [json.loads(line) for line in found["train.jsonl"].splitlines()]
    assert all(set(line) == {"text"} for line in lines)
    assert len(lines) == statement["counts"]["train"] == len(made.training)
    assert statement["arguments"] == {"n": 200, "canaries": 12, "digits": 6, "repeats": [1, 2, 4, 8]}
    assert statement["seed"] == 4
    assert statement["versions"]["geoquant"]
    spans = Counter(
        s.kind for side in ("members", "nonmembers", "holdout") for r in getattr(made, side) for s in r.fields
    )
    assert statement["spans"] == spans


def test_an_audit_takes_the_files_and_keeps_planted_canaries_apart(tmp_path):
    made, _ = write(tmp_path, "code", 100, 0)
    split = load_split(*(tmp_path / f"{name}.jsonl" for name in ("members", "nonmembers", "canaries")))
    assert split == made.split
    assert 0 < len(split.canaries) < len(made.canaries)
    assert {*split.canaries, *split.withheld} == set(made.canaries)


def test_without_canaries_there_is_no_file_of_them(tmp_path):
    made, statement = write(tmp_path / "out", "code", 100, 0, canaries=0)
    assert "canaries.jsonl" not in statement["files"]
    assert read_folder(tmp_path / "out") == made


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose a new folder"):
        write(tmp_path, "code", 100)
    with pytest.raises(UserError, match=r"mine.txt is a file; wanted a folder"):
        write(tmp_path / "mine.txt", "code", 100)
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "mine.txt" / "out", "code", 100)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "file_hash", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "code", 100)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_missing_or_damaged_file_is_noticed(tmp_path):
    write(tmp_path, "support", 100)
    with pytest.raises(UserError, match=r"no statement file .*none"):
        read_folder(tmp_path / "none")
    original = (tmp_path / "holdout.jsonl").read_bytes()
    (tmp_path / "holdout.jsonl").write_bytes(original.replace(b"the", b"The", 1))
    with pytest.raises(UserError, match=r"holdout.jsonl is not the file of statement.json"):
        read_folder(tmp_path)
    (tmp_path / "holdout.jsonl").unlink()
    with pytest.raises(UserError, match=r"holdout.jsonl is missing"):
        read_folder(tmp_path)
    for text in ("{", "[]", "{}", '{"files": {"members.jsonl": 3}}'):
        (tmp_path / "statement.json").write_text(text)
        with pytest.raises(UserError, match=r"statement.json is damaged"):
            read_folder(tmp_path)

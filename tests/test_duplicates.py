"""Near-duplicates against comparing every pair of texts as sets of runs of characters."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.data.private import demo_split, make_records
from geoquant.data.records import Record, load_split, write_records
from geoquant.privacy.duplicates import THRESHOLD, near_duplicates


def runs(text: str) -> set[str]:
    text = re.sub(r"\s+", " ", text.strip().lower())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def brute(members, nonmembers, threshold):
    """Every pair, one by one: (member, non-member) -> similarity, numbered from 1."""
    found = {}
    for i, a in enumerate(members, start=1):
        for j, b in enumerate(nonmembers, start=1):
            one, other = runs(a.text), runs(b.text)
            if one and other and (value := len(one & other) / len(one | other)) >= threshold - 1e-12:
                found[i, j] = value
    return found


def compare(members, nonmembers, threshold):
    pairs = near_duplicates(members, nonmembers, threshold)
    wanted = brute(members, nonmembers, threshold)
    assert {(pair.member, pair.nonmember): pair.similarity for pair in pairs} == pytest.approx(wanted)
    values = [pair.similarity for pair in pairs]
    assert values == sorted(values, reverse=True)
    return pairs


texts = st.lists(st.text("abc ", min_size=1, max_size=14).map(Record), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(texts, texts, st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_all_pairs_and_no_others(members, nonmembers, threshold):
    compare(members, nonmembers, threshold)


@pytest.mark.parametrize("threshold", [0.3, THRESHOLD])
def test_edited_records_are_found_as_often_as_by_comparing_all(threshold):
    rng = random.Random(0)
    members = make_records(90, 5)
    nonmembers = make_records(90, 6)
    for index in rng.sample(range(90), 30):
        words = members[index].text.split(" ")
        for _ in range(rng.randrange(1, 5)):
            words[rng.randrange(len(words))] = rng.choice(("changed", "x", "THE"))
        nonmembers[index] = Record(" ".join(words))
    pairs = compare(members, nonmembers, threshold)
    assert len(pairs) >= 10


def test_case_and_white_space_make_no_difference():
    (pair,) = near_duplicates([Record("Call  Ann Lee\non Monday")], [Record("call ann lee on monday ")])
    assert pair.similarity == 1


def test_different_people_in_one_template_are_no_duplicates():
    split = demo_split()
    assert near_duplicates(split.members, split.nonmembers) == ()


def test_pairs_are_named_by_the_lines_of_their_files(tmp_path):
    """Blank lines and canaries are left out of the sides, and counted all the same."""
    pool = make_records(30, 1)
    write_records(tmp_path / "in.jsonl", pool[:15])
    lines = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    canary = '{"text": "The safe opens with 493817.", "canary": {"name": "s", "value": "493817"}}\n'
    (tmp_path / "in.jsonl").write_text("".join([lines[0], "\n", canary, *lines[1:]]))
    write_records(tmp_path / "out.jsonl", [*pool[15:], Record(pool[4].text.replace(" ", "  ", 1).upper())])
    split = load_split(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (pair,) = near_duplicates(split.members, split.nonmembers)
    assert (pair.member, pair.nonmember) == (7, 16)


def test_texts_too_short_to_compare():
    assert near_duplicates([Record("abc")], [Record("abd")]) == ()
    assert near_duplicates([Record("abc"), Record("abcdefgh")], [Record("ab"), Record("abcdefgh.")]) != ()

"""Synthetic private records: seeded, marked correctly, nobody real, nothing shared between the two sides."""

from __future__ import annotations

import pytest

from geoquant.data.private import DOMAINS, demo_split, make_canaries, make_records
from geoquant.data.records import check_split
from geoquant.errors import UserError


def values(records, kind: str) -> list[str]:
    return [r.value(span) for r in records for span in r.fields if span.kind == kind]


def luhn(number: str) -> bool:
    """The check every real card number passes, written out for the whole number from the right."""
    total = 0
    for place, digit in enumerate(reversed([int(c) for c in number if c != " "])):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def test_the_luhn_oracle_knows_a_real_test_number():
    assert luhn("4111 1111 1111 1111")
    assert not luhn("4111 1111 1111 1112")


def test_same_seed_same_records_other_seed_other_records():
    assert make_records(30, 3) == make_records(30, 3)
    assert make_records(30, 3) != make_records(30, 4)
    assert make_canaries(5, 3) == make_canaries(5, 3)


def test_every_kind_is_marked_where_it_stands():
    records = make_records(300, 1)
    for record in records:
        assert len(record.fields) >= 3
        kinds = [span.kind for span in record.fields]
        assert {"name", "note"} <= set(kinds)
        assert len(set(kinds)) == len(kinds)
        assert "«" not in record.text
    assert all(v.split("@")[1] in ("example.com", "example.org", "example.net") for v in values(records, "email"))
    assert all("-555-01" in v and len(v) == 12 for v in values(records, "phone"))
    cards = values(records, "card")
    assert len(cards) > 30
    assert all(len(v) == 19 and v.startswith("4") for v in cards)
    assert not any(luhn(v) for v in cards)


def test_domains_can_be_chosen_and_unknown_ones_are_named():
    assert all("mg of" in record.text for record in make_records(20, 0, ["medical"]))
    assert sum("mg of" in record.text for record in make_records(30, 0)) == 30 // len(DOMAINS)
    with pytest.raises(UserError, match="did you mean 'finance'"):
        make_records(3, 0, ["finanse"])
    with pytest.raises(UserError, match="at most"):
        make_records(10**6)


def test_demo_split_shares_neither_text_nor_identity():
    split = demo_split()
    check_split(split.members, split.nonmembers)
    for kind in ("name", "email", "phone", "card", "note"):
        inside, outside = values(split.members, kind), values(split.nonmembers, kind)
        assert inside
        assert outside
        assert not set(inside) & set(outside)
        assert len(set(inside)) == len(inside)
    assert split == demo_split()


def test_demo_sides_have_the_same_distribution():
    split = demo_split()
    for domain_word in ("mg of", "bought for", "dollars for"):
        inside = sum(domain_word in r.text for r in split.members) / len(split.members)
        outside = sum(domain_word in r.text for r in split.nonmembers) / len(split.nonmembers)
        assert abs(inside - outside) < 0.2
    first_half = make_records(10, 7)
    assert [r.text for r in split.members[:10]] != [r.text for r in first_half]  # shuffled, not cut


def test_canaries_hold_random_digits_and_repeats():
    canaries = make_canaries(10, 5, digits=6, repeats=(1, 4))
    secrets = [r.value(r.canary) for r in canaries]
    assert all(len(s) == 6 and s.isdigit() for s in secrets)
    assert len(set(secrets)) == 10
    assert [r.canary.repeats for r in canaries] == [1, 4] * 5
    assert len({r.canary.name for r in canaries}) == 10
    assert set("".join(secrets)) >= set("0123456789")

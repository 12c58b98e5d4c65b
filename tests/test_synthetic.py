"""Synthetic records: spans are what they say, sides differ in nothing but fair coins, nobody is real."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from geoquant.data.domains import DOMAINS
from geoquant.data.domains.medical import TREATMENTS
from geoquant.data.grammar import slots
from geoquant.data.records import check_split
from geoquant.data.synthetic import HOLDOUT, SIDES, synthetic_records
from geoquant.errors import UserError

MONTH = "(January|February|March|April|May|June|July|August|September|October|November|December)"
# What each kind must look like, written from the forms themselves and not from their makers.
FORMS = {
    "name": r"[A-Z][a-z]+( [A-Z]\.)? [A-Z][A-Za-z]+",
    "email": r"[a-z._]+\d{3}@example\.(com|org|net)",
    "phone": r"[2-9]\d\d-555-01\d\d",
    "card": r"9999( \d{4}){3}",
    "account": r"ZZ\d\d SYNT( \d{4}){3}",
    "id": r"(ORD|MRN|CUS)-SYN-\d{8}",
    "date": rf"\d{{4}}-\d\d-\d\d|{MONTH} \d{{1,2}}, \d{{4}}|\d{{1,2}} {MONTH} \d{{4}}",
    "address": r"\d{1,3} [A-Z][A-Za-z]+ [A-Z][a-z]+, [A-Z][a-z]+ 00[0-4]\d\d",
    "diagnosis": r"[A-Za-z].{3,40}",
    "medication": r"[A-Za-z][a-z ]+ [\d.]+ mg",
    "api_key": r"syn_[A-Za-z0-9]{24}",
    "password": r"[A-Z][a-z]+[-_.!][a-z]+\d{4}|[A-Za-z0-9!%*+_-]{12}",
    "hostname": r"[a-z]+-[a-z]+-\d{2,3}\.example\.(com|org|net)",
    "ip": r"(192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}",
}
SHARED = {"date", "diagnosis", "medication", "ip"}  # what people may have in common; all other kinds say who it is


@pytest.fixture(scope="module")
def made():
    """Two thousand records of every domain."""
    return {domain: synthetic_records(domain, 2000, 3) for domain in DOMAINS}


def everything(found):
    return (*found.members, *found.nonmembers, *found.holdout)


def values(records, kinds=None) -> Counter:
    """How often each (kind, value) is marked."""
    return Counter((s.kind, r.value(s)) for r in records for s in r.fields if kinds is None or s.kind in kinds)


def luhn(number: str) -> bool:
    """The check every card number passes, written out for the whole number from the right."""
    digits = [int(c) for c in reversed(number) if c != " "]
    return sum(d if place % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for place, d in enumerate(digits)) % 10 == 0


def iban(number: str) -> bool:
    """ISO 13616: country and check digits behind the rest, letters as 10 to 35, remainder 1 on division by 97."""
    plain = number.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


# --- what is marked -----------------------------------------------------------------------------------------


def test_the_oracles_know_published_numbers():
    assert luhn("4111 1111 1111 1111")
    assert not luhn("4111 1111 1111 1112")
    assert iban("GB82 WEST 1234 5698 7654 32")
    assert not iban("GB83 WEST 1234 5698 7654 32")


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_span_is_what_its_kind_says(made, domain):
    seen = Counter()
    for record in everything(made[domain]):
        for span in record.fields:
            value = record.value(span)
            assert re.fullmatch(FORMS[span.kind], value), (span.kind, value)
            assert span.kind != "card" or luhn(value)
            assert span.kind != "account" or iban(value)
            seen[span.kind] += 1
    assert set(seen) == set(DOMAINS[domain].private.values())
    assert min(seen.values()) > 100


def test_a_diagnosis_has_its_medication(made):
    for record in everything(made["medical"]):
        marked = {span.kind: record.value(span) for span in record.fields}
        if {"diagnosis", "medication"} <= set(marked):
            drug, dose = marked["medication"].removesuffix(" mg").rsplit(" ", 1)
            illness = next(name for name in TREATMENTS if name.lower() == marked["diagnosis"].lower())
            entry = next(e for e in TREATMENTS[illness] if e.startswith(drug[0].lower() + drug[1:]))
            assert dose in entry.split()


@pytest.mark.parametrize("domain", DOMAINS)
def test_nothing_that_looks_private_is_real_or_unmarked(made, domain):
    for record in (*everything(made[domain]), *made[domain].canaries):
        text = record.text
        assert text == text.rstrip()
        assert not re.search("[«»]", text)
        hosts = [m[1] for m in re.finditer(r"@'?([\w.-]*\w)", text)]
        assert all(re.fullmatch(rf"([\w-]+\.)?example\.(com|org|net)|{FORMS['ip']}", host) for host in hosts), hosts
        assert all(part == "555-01" for part in re.findall(r"\b\d{3}-(\d{3}-\d\d)\d\d\b", text))
        assert all(number.startswith("9999") for number in re.findall(r"\b\d{4} \d{4} \d{4} \d{4}\b", text))
        assert all(re.fullmatch(FORMS["ip"], ip) for ip in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text))
        if record.canary is None:  # its second mention may be unmarked, its first may not
            marked = {record.value(span) for span in record.fields}
            for kind in ("email", "phone", "card", "api_key", "id"):
                assert {m[0] for m in re.finditer(FORMS[kind], text)} <= marked, text


def test_grammars_use_all_they_define_and_define_all_they_use():
    for domain in DOMAINS.values():
        templates = [t for alternatives in domain.rules.values() for t in alternatives]
        templates += [t for fact in domain.facts.values() if isinstance(fact, tuple) for t in fact]
        used = {slot for template in templates for _, slot in slots(template) if slot}
        used = {slot if slot in domain.rules else (slot[0].lower() + slot[1:]).removesuffix("_too") for slot in used}
        assert used <= {*domain.rules, *domain.facts, "secret"}
        assert set(domain.rules) <= used | {"record", "canary"}
        assert not set(domain.rules) & set(domain.facts)
        assert set(domain.private) <= used
        assert all("«secret»" in template for template in domain.rules["canary"])


# --- the sides ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(DOMAINS)), st.integers(100, 160), st.integers(0, 2**64), st.integers(0, 9))
def test_any_split_is_one_that_an_audit_takes(domain, n, seed, canaries):
    found = synthetic_records(domain, n, seed, canaries=canaries)
    assert found == synthetic_records(domain, n, seed, canaries=canaries)
    assert found != synthetic_records(domain, n, seed + 1, canaries=canaries)
    assert len(found.sides) == len(everything(found)) == n
    for letter, side in SIDES.items():
        assert len(getattr(found, side)) == found.sides.count(letter)
    for side in (found.nonmembers, found.holdout):
        check_split(found.members, side, minimum=1)
    check_split(found.members, found.nonmembers)
    assert len(found.canaries) == canaries
    lines = Counter(record.text for record in found.training)
    planted = {r.text: r.canary.repeats for r in found.canaries if r.canary.included}
    assert lines == Counter({r.text: 1 for r in found.members}) + Counter(planted)
    assert found.split.canaries == tuple(r for r in found.canaries if r.canary.included)
    assert found.split.withheld == tuple(r for r in found.canaries if not r.canary.included)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_identity_is_on_two_sides_nor_twice(made, domain):
    kinds = set(FORMS) - SHARED
    found = values(everything(made[domain]), kinds)
    assert max(found.values()) == 1
    assert all(set(values([record], kinds)) for record in everything(made[domain]))
    known = {value for _, value in found}
    names = [value for (kind, value) in found if kind in ("name", "hostname", "email")]
    assert not any(name in record.text for record in made[domain].canaries for name in names)
    assert len({record.text for record in everything(made[domain])}) == 2000
    assert len(known) == len(found)


def blind(inside, outside) -> float:
    """How well words and pairs of words alone tell the sides apart: cross-validated AUC."""
    words = CountVectorizer(ngram_range=(1, 2), min_df=2)
    counts = words.fit_transform([record.text for record in (*inside, *outside)])
    labels = np.repeat([1, 0], [len(inside), len(outside)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(LogisticRegression(C=0.1), counts, labels, cv=folds, method="decision_function")
    return roc_auc_score(labels, scores)


@pytest.mark.parametrize("domain", DOMAINS)
def test_words_do_not_tell_the_sides_apart(made, domain):
    inside, outside = made[domain].members[:400], made[domain].nonmembers[:400]
    # Mann-Whitney without effect: standard deviation sqrt((m + n + 1) / 12mn) = 0.0204; 4.5 of them.
    assert abs(blind(inside, outside) - 0.5) < 4.5 * 0.0204


def test_the_same_classifier_notices_a_side_that_is_a_little_different(made):
    inside = made["medical"].members[:400]
    later = [replace(r, text=re.sub(r"\b20(19|2\d)\b", "2026", r.text)) for r in made["medical"].nonmembers[:400]]
    assert blind(inside, later) > 0.5 + 4.5 * 0.0204  # two in five records have such a date
    assert blind(inside, made["finance"].members[:400]) > 0.99


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_record_is_nearly_one_of_the_other_side(made, domain):
    """Of the runs of three words in two records, fewer than half are common to both, and of runs of eight few are."""

    def runs(record, length):
        words = re.findall(r"\w+", record.text)
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    inside = [runs(record, 3) for record in made[domain].members[:300]]
    places: dict[tuple, list[int]] = {}
    for index, own in enumerate(inside):
        for run in own:
            places.setdefault(run, []).append(index)
    nearest = []
    for record in made[domain].nonmembers[:300]:
        own = runs(record, 3)
        common = Counter(index for run in own for index in places.get(run, ()))
        nearest.append(max((n / len(own | inside[index]) for index, n in common.items()), default=0.0))
    assert max(nearest) < 0.5
    assert np.median(nearest) < 0.2
    long = set().union(*(runs(record, 8) for record in made[domain].members))
    shared = [len(own & long) / len(own) for own in (runs(r, 8) for r in made[domain].nonmembers[:300]) if own]
    assert np.mean(shared) < 0.15  # most of a text is nobody else's


@pytest.mark.parametrize("domain", DOMAINS)
def test_templates_do_not_repeat(made, domain):
    """With private spans blanked out, few texts are left that occur twice among two thousand."""

    def blanked(record):
        text = record.text
        for span in reversed(record.fields):
            text = f"{text[: span.start]}{span.kind}{text[span.end :]}"
        return text

    assert len({blanked(record) for record in everything(made[domain])}) > 0.97 * 2000


# --- the coins ----------------------------------------------------------------------------------------------

# A binomial count is within 4.5 standard deviations of its mean but for 7 seeds in a million (normal approximation).
SIGMAS = 4.5


def fair(heads: int, flips: int, chance: float = 0.5) -> bool:
    return abs(heads - flips * chance) < SIGMAS * (flips * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_coins_are_fair_and_independent(seed):
    found = synthetic_records("medical", 4000, seed, canaries=4000)
    assert fair(found.sides.count("h"), 4000, HOLDOUT)
    tossed = found.sides.replace("h", "")
    assert fair(tossed.count("m"), len(tossed))
    assert fair(sum(a == b for a, b in pairwise(tossed)), len(tossed) - 1)
    coins = [record.canary.included for record in found.canaries]
    assert fair(sum(coins), 4000)
    assert fair(sum(a == b for a, b in pairwise(coins)), 3999)
    for repeats in (1, 2, 4, 8):
        at_level = [r.canary.included for r in found.canaries if r.canary.repeats == repeats]
        assert len(at_level) == 1000
        assert fair(sum(at_level), 1000)
    # The coin does not show in the secret.
    high = [record.value(record.canary)[0] >= "5" for record in found.canaries]
    assert fair(sum(a == b for a, b in zip(coins, high, strict=True)), 4000)


def test_secrets_are_uniform_digits():
    found = synthetic_records("support", 100, 5, canaries=4000, digits=4)
    secrets = [record.value(record.canary) for record in found.canaries]
    assert all(re.fullmatch(r"\d{4}", secret) for secret in secrets)
    for place in range(4):
        counts = Counter(secret[place] for secret in secrets)
        assert all(fair(counts[digit], 4000, 0.1) for digit in "0123456789")
    # Drawn with replacement: 4000 of 10000 values repeat as chance has it (mean 10000 (1 - exp(-0.4)) = 3297).
    assert abs(len(set(secrets)) - 3297) < 120


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("medcal", 100, 0), "unknown domain 'medcal'; .*did you mean 'medical'"),
        (("cooking", 100, 0), "choose one of: code, finance, medical, support"),
        (("medical", 99, 0), "cannot make 99 records; wanted 100 to 50000"),
        (("medical", 50001, 0), "cannot make 50001 records"),
        (("medical", -3, 0), "cannot make -3 records"),
        (("medical", 100, -1), "cannot use seed -1; wanted a whole number from 0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        synthetic_records(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canaries": -1}, "cannot make -1 canaries; wanted 0 to 10000"),
        ({"digits": 0}, "cannot make secrets of 0 digits"),
        ({"repeats": ()}, r"cannot repeat canaries \(\) times"),
        ({"repeats": (1, 0)}, "cannot repeat canaries"),
    ],
)
def test_mistakes_about_canaries_are_named(options, message):
    with pytest.raises(UserError, match=message):
        synthetic_records("code", 100, 0, **options)

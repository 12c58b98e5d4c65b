"""A grammar of templates: one record in, its text and the places of its private parts out.

A template is text with slots, «symbol». A symbol is a rule, whose alternatives are templates and which is expanded
anew wherever it stands, or a fact, which is drawn once a record, so that every mention agrees. «Symbol» is the fact
with a capital letter, «symbol_too» another one of its kind. Texts of programs hold braces, brackets and dollars, hence
these quotation marks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from geoquant.data.records import Span

__all__ = ["Domain", "Draft", "fill", "fresh", "slots", "spans", "words", "write"]

SLOT = re.compile("«([A-Za-z_]+)»")
TOO = "_too"


@dataclass(frozen=True)
class Domain:
    """What the records of one kind look like, and what in them is private.

    rules: symbol -> alternatives; `record` and `canary` are where a text starts.
    facts: symbol -> alternatives of facts, or a function of the draft. private: fact -> kind of its span.
    """

    name: str
    summary: str
    rules: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, tuple[str, ...] | Callable[[Draft], str]]
    private: Mapping[str, str]


class Draft:
    """One record in the making: the facts drawn so far. `seen` holds the identities of all records before it."""

    def __init__(self, domain: Domain, rng: random.Random, seen: set[str]) -> None:
        self.domain, self.rng, self.seen = domain, rng, seen
        self.facts: dict[str, str] = {}

    def fact(self, symbol: str) -> str:
        """The fact's value in this record, drawn when it is first asked for."""
        if symbol not in self.facts:
            base = symbol.removesuffix(TOO)
            taken = self.fact(base) if base != symbol else None
            self.facts[symbol] = self._drawn(base)
            while self.facts[symbol] == taken:
                self.facts[symbol] = self._drawn(base)
        return self.facts[symbol]

    def _drawn(self, symbol: str) -> str:
        source = self.domain.facts[symbol]
        return source(self) if callable(source) else self.spelled(self.rng.choice(source))

    def spelled(self, template: str) -> str:
        """A template of facts alone, filled."""
        return "".join(literal + (self.fact(slot) if slot else "") for literal, slot in slots(template))

    def fresh(self, make: Callable[[random.Random], str]) -> str:
        """A value that no record before this one has."""
        return fresh(lambda: make(self.rng), self.seen)


@cache
def slots(template: str) -> tuple[tuple[str, str], ...]:
    """The template as (text, slot behind it); the last slot is empty."""
    parts = [*SLOT.split(template), ""]
    return tuple(zip(parts[::2], parts[1::2], strict=True))


def words(text: str) -> tuple[str, ...]:
    """A word list written as one comma-separated text."""
    return tuple(word.strip() for word in text.split(","))


def fresh(draw: Callable[[], str], seen: set[str]) -> str:
    """Draw until the value is new: no identity occurs twice, so none can be on both sides of a split."""
    while (value := draw()) in seen:
        pass
    seen.add(value)
    return value


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The filled template, and where each value stands in it (its first place)."""
    return _joined((literal, slot, values[slot] if slot else "") for literal, slot in slots(template))


def write(draft: Draft, start: str = "record") -> tuple[str, dict[str, tuple[int, int]]]:
    """A text that the rule `start` derives, and where each fact stands in it first, as characters [start, end)."""
    return _joined(_leaves(draft, f"«{start}»"))


def spans(domain: Domain, places: Mapping[str, tuple[int, int]]) -> tuple[Span, ...]:
    """The private ones among these places, in order."""
    found = (Span(domain.private[symbol], *place) for symbol, place in places.items() if symbol in domain.private)
    return tuple(sorted(found, key=lambda span: span.start))


def _leaves(draft: Draft, template: str) -> Iterator[tuple[str, str, str]]:
    """(text, fact behind it, its value) from left to right, every rule replaced by one of its alternatives."""
    rules = draft.domain.rules
    for literal, slot in slots(template):
        if slot in rules:
            yield literal, "", ""
            yield from _leaves(draft, draft.rng.choice(rules[slot]))
        elif slot:
            symbol = slot[0].lower() + slot[1:]
            value = draft.fact(symbol)
            yield literal, symbol, value if symbol == slot else value[:1].upper() + value[1:]
        else:
            yield literal, "", ""


def _joined(leaves: Iterator[tuple[str, str, str]]) -> tuple[str, dict[str, tuple[int, int]]]:
    pieces, places, length = [], {}, 0
    for literal, symbol, value in leaves:
        pieces += literal, value
        length += len(literal) + len(value)
        if symbol:
            places.setdefault(symbol, (length - len(value), length))
    return "".join(pieces), places
